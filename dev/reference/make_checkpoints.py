#!/usr/bin/env python3
"""Checkpoints of every era, written by real PyTorch, for the test convert_own.

    venv/bin/python dev/reference/make_checkpoints.py         torch 2, transformers: model/, expected.safetensors, cases
    /usr/bin/python3 dev/reference/make_checkpoints.py        torch 1 (Debian's python3-torch): the other cases
    .. --ngc MODEL OUT.zip                                    only this: a folder of Hugging Face's as NVIDIA's zip

One small random GPT-2, model/, stands in every file of cases.tsv: cut for ranks and stages, renamed, its Q, K and V
reordered, rounded to a type, as Megatron and Hugging Face's tools have stored it since 2019. expected.safetensors has

    tokens                       I32 (T)       all positions of the model
    logits.F32 .F16 .BF16        F32 (T, V)    of the model with weights of this type

computed by transformers in float64. cases.tsv has one line for each: path, type of the weights, options of convert;
or, for a file that convert must refuse, the word "refused" and what the message must say.

This is the second opinion on the layouts, so it shares nothing with convert.c. And it has a third: all cases, also
those that another run has written, are loaded with torch.load and run as Megatron ran them, rank by rank, with the
split of Q, K and V of their time (attention() below). The logits must be those of transformers.
"""
import argparse
import collections
import enum
import io
import json
import math
import os
import pathlib
import random
import shutil
import sys
import types
import zipfile

import numpy as np
import torch
from torch.nn.functional import gelu, layer_norm, softmax

FOLDER = pathlib.Path(__file__).resolve().parent / "checkpoints"
TORCH = int(torch.__version__.split(".")[0])
L, C, H, P, V = 2, 8, 4, 10, 40                     # heads of 2: two on each of two ranks
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
cases = []                                          # lines of cases.tsv


# ---- The model, and what transformers says of it ---------------------------------------------------------------------


def write_model():
    import transformers
    from safetensors.torch import save_file
    transformers.logging.disable_progress_bar()
    config = transformers.GPT2Config(n_layer=L, n_head=H, n_embd=C, n_positions=P, vocab_size=V, bos_token_id=V - 1,
                                     eos_token_id=V - 1, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config).eval()
    rng = np.random.Generator(np.random.PCG64(1909))
    for name, p in model.named_parameters():
        x = rng.standard_normal(tuple(p.shape))
        if ".ln_" in name and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x *= 0.1
        elif ".h." in name:                         # wide enough that attention has preferences
            x *= 1.5 / math.sqrt(p.shape[0])
        p.data = torch.from_numpy(x.astype(np.float32))
    for folder in ("model", "hf_shards", "refused"):
        shutil.rmtree(FOLDER / folder, ignore_errors=True)
    model.save_pretrained(FOLDER / "model")
    model.save_pretrained(FOLDER / "hf_shards", max_shard_size="5KB")
    expected = {"tokens": torch.from_numpy(rng.integers(0, V, P).astype(np.int32))}
    for dtype, to in DTYPES.items():
        rounded = transformers.GPT2LMHeadModel(config).eval()
        rounded.load_state_dict(model.state_dict())
        with torch.no_grad():
            logits = rounded.to(to).double()(expected["tokens"][None].long()).logits[0]
        expected["logits." + dtype] = logits.float()
    save_file(expected, FOLDER / "expected.safetensors")
    for file in FOLDER.glob("*/generation_config.json"):
        file.unlink()


def read_safetensors(path):
    """Without the package, which Debian does not have."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, t in json.loads(data[8:start]).items():
        if name != "__metadata__":
            dtype = {"F32": np.float32, "I32": np.int32}[t["dtype"]]
            values = np.frombuffer(data[start + t["data_offsets"][0]:start + t["data_offsets"][1]], dtype).copy()
            tensors[name.replace("transformer.", "")] = torch.from_numpy(values).view(t["shape"])
    return tensors


# ---- How Megatron stores it ------------------------------------------------------------------------------------------
# Prefixes of the embeddings and of all else; in a layer first norm, Q K V, projection, second norm, MLP; last norm.
OLD = ["input_layernorm.", "attention.query_key_value.", "attention.dense.", "post_attention_layernorm.",
       "mlp.dense_h_to_4h.", "mlp.dense_4h_to_h.", "final_layernorm."]
ENCODER = [name.replace("attention.q", "self_attention.q").replace("attention.d", "self_attention.d") for name in OLD]
NORMS = ["input_norm."] + ENCODER[1:3] + ["post_attention_norm."] + ENCODER[4:6] + ["final_norm."]
ENGINE = ["self_attention.layernorm_qkv.layer_norm_", "self_attention.layernorm_qkv.", "self_attention.proj.",
          "layernorm_mlp.layer_norm_", "layernorm_mlp.fc1_", "layernorm_mlp.fc2_", "final_layernorm."]
CORE = ["input_layernorm.", "self_attention.linear_qkv.", "self_attention.linear_proj.", "pre_mlp_layernorm.",
        "mlp.linear_fc1.", "mlp.linear_fc2.", "final_layernorm."]
CORE_ENGINE = ["self_attention.linear_qkv.layer_norm_", CORE[1], CORE[2], "mlp.linear_fc1.layer_norm_", *CORE[4:]]
ERAS = {
    "2019-07": ("", "transformer.", OLD),
    "2019-10": ("language_model.embedding.", "language_model.transformer.", OLD),
    "2021-01": ("language_model.embedding.", "language_model.encoder.", ENCODER),
    "2023-09": ("language_model.embedding.", "language_model.encoder.", NORMS),
    "engine": ("language_model.embedding.", "language_model.encoder.", ENGINE),
    "core": ("embedding.", "decoder.", CORE),
    "core engine": ("embedding.", "decoder.", CORE_ENGINE),
}
HF = ["ln_1.", "attn.c_attn.", "attn.c_proj.", "ln_2.", "mlp.c_fc.", "mlp.c_proj."]
HEAD = {"core": "output_layer.weight"}              # the last stage's copy of the word embedding


def join_qkv(q, k, v, version, width):
    """Rows of one rank's Q, K and V, in the order of a version; (rows, ..) each, `width` of them a head."""
    if version == 0:                                # all of Q, all of K, all of V
        return torch.cat([q, k, v])
    if version == 1:                                # row by row
        return torch.stack([q, k, v], 1).flatten(0, 1)
    heads = [x.unflatten(0, (-1, width)) for x in (q, k, v)]
    return torch.stack(heads, 1).flatten(0, 2)      # head by head


def rank_tensors(w, era, version, tp, pp, r, stage, heads=H, divisible=128):
    """What tensor rank r of a stage holds, by its Megatron name; w has Hugging Face's names and matrices [in, out]."""
    embedding, body, names = ERAS[era]
    layers = sum(name.endswith("ln_1.weight") for name in w) // pp
    wte = w["wte.weight"]
    padding = -len(wte) % (divisible * tp)          # rows that no token uses are noise
    noise = torch.sin(torch.arange(padding * wte.shape[1], dtype=torch.float32)).view(padding, wte.shape[1])
    wte = torch.cat([wte, noise.to(wte.dtype)]).chunk(tp)[r].clone()
    flat = {}
    if stage == 0:
        flat[embedding + "word_embeddings.weight"] = wte
        flat[embedding + "position_embeddings.weight"] = w["wpe.weight"]
    for i in range(layers):
        for hf, name in zip(HF, names):
            for kind in ("weight", "bias"):
                x = w[f"h.{stage * layers + i}.{hf}{kind}"].t()  # [out, in]; a bias stays as it is
                if hf == "attn.c_attn.":
                    x = join_qkv(*(part.chunk(tp)[r] for part in x.chunk(3)), version, x.shape[0] // 3 // heads)
                elif hf == "mlp.c_fc.":             # columns of x W: rows of W^T
                    x = x.chunk(tp)[r]
                elif hf.endswith("c_proj.") and kind == "weight":
                    x = x.chunk(tp, 1)[r]
                flat[f"{body}layers.{i}.{name}{kind}"] = x.contiguous()
    if stage == pp - 1:
        for kind in ("weight", "bias"):
            flat[body + names[6] + kind] = w["ln_f." + kind]
        if stage:
            flat[HEAD.get(era, "word_embeddings_for_head.weight")] = wte
    return flat


def nest(flat):
    """As the modules' state dicts nest: embeddings one by one, the body under one name, both in language_model."""
    model = collections.OrderedDict()
    for name, x in flat.items():
        path = name.split(".")
        deep = 3 if name.startswith("language_model.embedding") else 2 if name.startswith("language_model") else \
            1 if name.startswith("word_embeddings_for_head") else 0
        at = model
        for key in path[:deep]:
            at = at.setdefault(key, collections.OrderedDict())
        at[".".join(path[deep:])] = x
        at._metadata = collections.OrderedDict({"": {"version": 1}})  # as state_dict() leaves it
    return model


def stand_in(module, name, **members):
    """A class of Megatron's, as pickle sees it: a name in a module; with members, an enum."""
    parts = module.split(".")
    for i in range(len(parts)):
        sys.modules.setdefault(".".join(parts[:i + 1]), types.ModuleType(parts[i]))
    made = enum.Enum(name, members, module=module) if members else type(name, (), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


LossScaler = stand_in("fp16.loss_scaler", "DynamicLossScaler")
ModelType = stand_in("megatron.core.enums", "ModelType", encoder_or_decoder=1)


def arguments(year, dtype, tp=1, pp=1, rank=0, **more):
    """The args of a training run, as they were called in a year; the activation is the tanh formula in all."""
    a = dict(num_layers=L, hidden_size=C, num_attention_heads=H, max_position_embeddings=P, seq_length=P,
             make_vocab_size_divisible_by=128, layernorm_epsilon=1e-5, attention_dropout=0.1, hidden_dropout=0.1,
             apply_residual_connection_post_layernorm=False, fp16=dtype == "F16", rank=rank, world_size=tp * pp,
             lr=1.5e-4, train_data=None, data_path=["data/text", 0.7], tokenizer_type="GPT2BPETokenizer", seed=1234)
    a["model_parallel_size" if year < 2020.8 else "tensor_model_parallel_size"] = tp
    if year > 2020.28:                              # April 2020; before, there was no other activation
        a["openai_gelu"] = year < 2020.7
    if year > 2020.69:
        a["bias_gelu_fusion"] = True
    if year > 2020.8:
        a.update(pipeline_model_parallel_size=pp, padded_vocab_size=V + -V % (128 * tp))
    if year > 2021:
        a.update(ffn_hidden_size=4 * C, kv_channels=C // H, bf16=dtype == "BF16", params_dtype=DTYPES[dtype])
    if year > 2023:
        a.update(swiglu=False, normalization="LayerNorm", position_embedding_type="learned_absolute",
                 untie_embeddings_and_output_weights=False, group_query_attention=False, num_experts=None,
                 virtual_pipeline_model_parallel_size=None, model_type=ModelType.encoder_or_decoder,
                 apply_layernorm_1p=False, add_position_embedding=True)
    return argparse.Namespace(**dict(a, **more))


def training_state(w):
    """The optimizer with its pickled object and integer keys, the schedule, and every kind of random state."""
    p = w["ln_f.weight"].float().clone().requires_grad_()
    adam = torch.optim.Adam([p])
    p.sum().backward()
    adam.step()
    scaler = LossScaler()
    scaler.__dict__.update(cur_scale=65536.0, cur_iter=3, last_overflow_iter=-1, scale_factor=2.0, scale_window=1000)
    state = adam.state_dict()
    state["state"] = {140213371328112: state["state"][0]}  # keys were addresses once
    return {"optimizer": {"optimizer": state, "loss_scaler": scaler, "fp32_from_fp16": [[p.detach()]]},
            "lr_scheduler": {"max_lr": 1.5e-4, "num_iters": 3, "decay_style": "cosine"},
            "random_rng_state": random.Random(1).getstate(), "np_rng_state": np.random.RandomState(1).get_state(),
            "torch_rng_state": torch.Generator().manual_seed(1).get_state(),
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
            "rng_tracker_states": {"model-parallel-rng": torch.ones(16, dtype=torch.uint8)}}


# ---- The cases -------------------------------------------------------------------------------------------------------


def save(what, path, zipped):
    if isinstance(path, pathlib.Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(what, path, _use_new_zipfile_serialization=zipped)


def rounded(w, dtype):
    return {name: x.to(DTYPES[dtype]) for name, x in w.items()}


def megatron(w, name, writer, era, version, dtype, zipped, tp=1, pp=1, year=None, iteration=None, extra=None):
    """One checkpoint folder. writer: the torch that writes it, 1 or 2. version None: the file does not tell, so 0.
    year None: no args. extra: what else is in the file."""
    numbered = "release" if iteration is None else f"iter_{iteration:07d}"
    told = "--vocab-size 40" if year else "--config dev/reference/checkpoints/model/config.json"
    cases.append((name, dtype, told, dict(era=era, version=version or 0, tp=tp, pp=pp, root=f"{name}/{numbered}")))
    if TORCH != writer:
        return
    w = rounded(w, dtype)
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    for stage in range(pp):
        for r in range(tp):
            flat = rank_tensors(w, era, version or 0, tp, pp, r, stage)
            if "engine" in era:                     # what TransformerEngine keeps for FP8, nothing or an empty stream
                flat[ERAS[era][1] + "layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"")
            file = {"iteration": iteration or 0}
            if year:
                file["args"] = arguments(year, dtype, tp, pp, stage * tp + r)
            if version is not None:
                file["checkpoint_version"] = version
            file["model"] = nest(flat)
            file.update(extra or {})
            save(file, FOLDER / name / numbered / rank_folder(r, stage, pp) / "model_optim_rng.pt", zipped)
    tracker = "release" if iteration is None else str(iteration)
    (FOLDER / name / "latest_checkpointed_iteration.txt").write_text(tracker)


def rank_folder(r, stage, pp):
    return f"mp_rank_{r:02d}" + (f"_{stage:03d}" if pp > 1 else "")


def write_ngc(w, path, method):
    """A zip as NVIDIA ships it: one fp16 file without args and version, and the tracker. w in Hugging Face's layout."""
    file = io.BytesIO()
    save({"iteration": 0, "model": nest(rank_tensors(rounded(w, "F16"), "2019-10", 0, 1, 1, 0, 0))}, file, zipped=False)
    with zipfile.ZipFile(path, "w") as z:
        for member, data in (("latest_checkpointed_iteration.txt", b"release"), ("release/", b""),
                             ("release/mp_rank_00/", b""),
                             ("release/mp_rank_00/model_optim_rng.pt", file.getbuffer())):
            info = zipfile.ZipInfo(member, (2020, 4, 16, 0, 0, 0))
            info.compress_type = method if data else zipfile.ZIP_STORED
            z.writestr(info, data)


def ngc(w, name, method):
    cases.append((name, "F16", "--config dev/reference/checkpoints/model/config.json", None))
    if TORCH == 1:
        write_ngc(w, FOLDER / name, method)


def hugging_face(w, name, writer, dtype, zipped, make):
    cases.append((name, dtype, "--to hf", None))
    if TORCH == writer:
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        save(make(rounded(w, dtype)), FOLDER / name / "pytorch_model.bin", zipped)
        shutil.copy(FOLDER / "model/config.json", FOLDER / name)


def converted(w):
    """As Hugging Face's script leaves them: turned views, mask buffers; wte and lm_head one part of a padded matrix."""
    mask = torch.tril(torch.ones(P, P, dtype=torch.float16)).view(1, 1, P, P)
    state = {}
    for name, x in w.items():
        turned = x.dim() == 2 and name.startswith("h.")
        state["transformer." + name] = x.t().contiguous().t() if turned else x
        if name.endswith("c_attn.bias"):
            state["transformer." + name[:-11] + "bias"] = mask
            state["transformer." + name[:-11] + "masked_bias"] = torch.tensor(-1e4, dtype=torch.float16)
    state["transformer.wte.weight"] = torch.cat([w["wte.weight"], torch.ones(8, C).to(w["wte.weight"].dtype)])[:V]
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def write_cases(w):
    megatron(w, "flat_2019", 1, "2019-07", None, "F16", zipped=False, iteration=7)
    megatron(w, "v0_tp2", 1, "2019-10", None, "F16", zipped=False, tp=2)
    megatron(w, "v0_training", 1, "2019-10", None, "F16", zipped=False, year=2020.25, iteration=3,
             extra=training_state(w))
    megatron(w, "v1_tp2", 1, "2019-10", 1, "F16", zipped=False, tp=2, year=2020.75)
    megatron(w, "v2", 1, "2019-10", 2.0, "F16", zipped=True, year=2020.79)
    megatron(w, "v3_transformer", 1, "2019-10", 3.0, "F32", zipped=False, year=2020.9)
    megatron(w, "v3_encoder_tp2_pp2", 1, "2021-01", 3.0, "F16", zipped=True, tp=2, pp=2, year=2021.1)
    megatron(w, "v3_encoder_bf16", 2, "2021-01", 3.0, "BF16", zipped=True, year=2022.5,
             extra={"rng_state": [{"np_rng_state": np.random.RandomState(1).get_state(), "rng_tracker_states": {}}]})
    megatron(w, "norms_2023", 2, "2023-09", 3.0, "F32", zipped=True, year=2023.7)
    megatron(w, "engine", 2, "engine", 3.0, "BF16", zipped=True, year=2023.8)
    megatron(w, "core_pp2", 2, "core", 3.0, "F16", zipped=True, pp=2, year=2024.1, iteration=1000000)
    megatron(w, "core_engine", 2, "core engine", 3.0, "F16", zipped=True, year=2024.5)
    ngc(w, "ngc_stored.zip", zipfile.ZIP_STORED)
    ngc(w, "ngc_deflated.zip", zipfile.ZIP_DEFLATED)
    hugging_face(w, "hf_legacy", 1, "F16", False, converted)
    hugging_face(w, "hf_zip", 2, "F32", True, converted)
    hugging_face(w, "hf_parameters", 2, "BF16", True, lambda w: {k: torch.nn.Parameter(x) for k, x in w.items()})
    cases.append(("model", "F32", "--to hf", None))
    cases.append(("hf_shards", "F32", "--to hf", None))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_pickle_was_run",)


def write_refused():
    """Files of one layer, wrong in one way each, and what convert must say; most are torch's own work."""
    size = dict(num_layers=1, hidden_size=4, num_attention_heads=2, max_position_embeddings=4, ffn_hidden_size=16,
                kv_channels=2, make_vocab_size_divisible_by=4, seq_length=4)
    shapes = {"wte.weight": (8, 4), "wpe.weight": (4, 4), "h.0.attn.c_attn.weight": (4, 12),
              "h.0.attn.c_attn.bias": (12,), "h.0.attn.c_proj.weight": (4, 4), "h.0.mlp.c_fc.weight": (4, 16),
              "h.0.mlp.c_fc.bias": (16,), "h.0.mlp.c_proj.weight": (16, 4)}
    for name in ("h.0.ln_1.weight", "h.0.ln_1.bias", "h.0.ln_2.weight", "h.0.ln_2.bias", "ln_f.weight", "ln_f.bias",
                 "h.0.attn.c_proj.bias", "h.0.mlp.c_proj.bias"):
        shapes[name] = (4,)
    w = {name: torch.arange(1.0, 1 + math.prod(shape)).view(shape) / 64 for name, shape in shapes.items()}
    norm, matrix = "language_model.encoder.layers.0.input_layernorm.weight", \
        "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight"

    def make(r=0, tp=1, change=(), version=3.0, **args):
        flat = dict(rank_tensors(w, "2021-01", version, tp, 1, r, 0, heads=2, divisible=4), **dict(change))
        args = arguments(2021.1, "F32", tp, 1, r, **dict(size, padded_vocab_size=8, **args))
        flat = {name: x for name, x in flat.items() if x is not None}
        return {"args": args, "checkpoint_version": version, "model": nest(flat)}

    def refused(name, phrase, file=None, zipped=False, damage=None, how=None):
        cases.append(("refused/" + name, "refused", phrase, None))
        if TORCH == 1:
            return
        path = FOLDER / "refused" / name
        if how:
            how(path)
        else:
            save(make() if file is None else file, path, zipped)
        if damage:
            path.write_bytes(damage(path.read_bytes()))

    def ranks(second):
        def write(path):
            save(make(0, 2), path / "mp_rank_00/model_optim_rng.pt", False)
            if second:
                save(make(1, 2, {norm: torch.full((4,), 0.5)}), path / "mp_rank_01/model_optim_rng.pt", False)
        return write

    def at(needle, offset, byte):
        def change(data):
            where = data.index(needle) + offset
            return data[:where] + byte + data[where + 1:]
        return change

    cycle = make()
    cycle["model"]["language_model"]["encoder"]["again"] = cycle["model"]
    first = w["wpe.weight"].numpy().tobytes()
    refused("cut_in_pickle.pt", "more bytes are announced", damage=lambda data: data[:900])
    refused("cut_in_storage.pt", "cut short", damage=lambda data: data[:-9])
    refused("cut_zip.pt", "end record", zipped=True, damage=lambda data: data[:-30])
    refused("bit_flip.pt", "checksum", zipped=True, damage=at(first, 5, b"\x77"))
    refused("big_endian.pt", "little-endian", damage=at(b"little_endian", 15, b"\x89"))
    refused("complex.pt", "unknown type", make(change={matrix: torch.zeros(16, 4, dtype=torch.complex64)}))
    refused("integers.pt", "real numbers are expected", make(change={matrix: torch.zeros(16, 4, dtype=torch.int32)}))
    refused("sparse.pt", "opaque", make(change={matrix: torch.eye(16, 4).to_sparse()}))
    refused("hostile.pt", "opaque", make(change={norm: Hostile()}))
    refused("protocol_4.pt", "protocol 4", how=lambda path: torch.save(make(), path, pickle_protocol=4))
    refused("torchscript.pt", "TorchScript", how=lambda path: torch.jit.script(torch.nn.LayerNorm(4)).save(str(path)))
    refused("cycle.pt", "contains itself", cycle)
    refused("not_a_number.pt", "NaN", make(change={norm: torch.tensor([1, math.nan, 1, 1])}))
    refused("missing_layer.pt", "h.1.ln_1.weight is missing", make(num_layers=2))
    refused("missing_bias.pt", "h.0.ln_1.bias is missing", make(change={norm.replace("weight", "bias"): None}))
    refused("version_untold.pt", "--checkpoint-version", {k: x for k, x in make().items() if k != "checkpoint_version"})
    refused("swiglu.pt", "swiglu", make(swiglu=True))
    refused("missing_rank", "2 tensor ranks", how=ranks(False))
    refused("replicas_differ", "differs", how=ranks(True))


# ---- The third opinion: run every file as its time did ---------------------------------------------------------------


def flatten(model, prefix=""):
    flat = {}
    for key, value in model.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def attention(mixed, version, heads):
    """One rank's heads; mixed (T, 3*rows): the product with its matrix of Q, K and V, split as Megatron split it."""
    if version == 0:                                # three blocks of columns, then heads
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in mixed.chunk(3, -1))
    elif version == 1:                              # heads, then every third column
        q, k, v = mixed.unflatten(-1, (heads, -1, 3)).unbind(-1)
    else:                                           # heads, then three blocks
        q, k, v = mixed.unflatten(-1, (heads, -1)).chunk(3, -1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
    return torch.einsum("hij,jhd->ihd", softmax(scores, -1), v).flatten(1)


def forward(stages, era, version, tokens):
    """stages[stage][rank]: tensors by name. Every sum over ranks is one of the paper's all-reduces."""
    embedding, body, names = ERAS[era]
    tp, pp = len(stages[0]), len(stages)
    for stage in stages:
        for rank in stage:
            for name, x in rank.items():
                rank[name] = x.double() if torch.is_tensor(x) and x.is_floating_point() else x
    tables = [rank[embedding + "word_embeddings.weight"] for rank in stages[0]]
    rows = len(tables[0])                           # of the vocabulary, on each rank
    x = stages[0][0][embedding + "position_embeddings.weight"][:len(tokens)]
    for r, table in enumerate(tables):
        mine = (tokens >= r * rows) & (tokens < (r + 1) * rows)
        x = x + table[torch.where(mine, tokens - r * rows, 0 * tokens)] * mine[:, None]
    for ranks in stages:
        for i in range(L // pp):
            def of(r, which, kind):
                return ranks[r][f"{body}layers.{i}.{names[which]}{kind}"]

            def norm(x, which):
                return layer_norm(x, (C,), of(0, which, "weight"), of(0, which, "bias"), 1e-5)
            a = norm(x, 0)
            heads = [attention(a @ of(r, 1, "weight").t() + of(r, 1, "bias"), version, H // tp) for r in range(tp)]
            x = x + sum(heads[r] @ of(r, 2, "weight").t() for r in range(tp)) + of(0, 2, "bias")
            a = norm(x, 3)
            inner = [a @ of(r, 4, "weight").t() + of(r, 4, "bias") for r in range(tp)]
            inner = [0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y ** 3))) for y in inner]
            x = x + sum(inner[r] @ of(r, 5, "weight").t() for r in range(tp)) + of(0, 5, "bias")
    x = layer_norm(x, (C,), stages[-1][0][body + names[6] + "weight"], stages[-1][0][body + names[6] + "bias"], 1e-5)
    if pp > 1:
        tables = [rank[HEAD.get(era, "word_embeddings_for_head.weight")] for rank in stages[-1]]
    return torch.cat([x @ table.t() for table in tables], 1)[:, :V]


def load(path):
    if not hasattr(np, "_core"):                    # what NumPy 2 has pickled, for NumPy 1
        sys.modules.update({"numpy._core": np.core, "numpy._core.multiarray": np.core.multiarray})
    return torch.load(path, **({} if TORCH == 1 else {"weights_only": False}))


def check_cases(expected):
    worst, checked = 0, 0
    for name, dtype, _, layout in cases:
        if not layout or not (FOLDER / name).exists():  # the other torch is to write it
            continue
        tp, pp, root = layout["tp"], layout["pp"], FOLDER / layout["root"]
        stages = [[flatten(load(root / rank_folder(r, stage, pp) / "model_optim_rng.pt")["model"]) for r in range(tp)]
                  for stage in range(pp)]
        seen = forward(stages, layout["era"], layout["version"], expected["tokens"].long())
        wanted = expected["logits." + dtype].double()
        error = ((seen - wanted).norm() / wanted.norm()).item()
        assert error < 6e-8, (name, error)          # half an epsilon of each: they were rounded to be written
        worst, checked = max(worst, error), checked + 1
    print(f"torch {torch.__version__}: {checked} Megatron checkpoints, run as their time did, "
          f"have transformers' logits; largest relative error {worst:.2g}")


def check_hugging_face(expected):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    checked = 0
    for name, dtype, told, _ in cases:
        if told == "--to hf" and (FOLDER / name).exists():
            model = transformers.GPT2LMHeadModel.from_pretrained(FOLDER / name, attn_implementation="eager").eval()
            with torch.no_grad():
                seen = model.double()(expected["tokens"][None].long()).logits[0]
            error = (seen - expected["logits." + dtype].double()).norm() / seen.norm()
            assert error < 6e-8, (name, error)
            checked += 1
    print(f"transformers {transformers.__version__}: the {checked} folders of Hugging Face's have them too")


def main():
    if len(sys.argv) == 4 and sys.argv[1] == "--ngc":
        model, path = map(pathlib.Path, sys.argv[2:])
        return write_ngc(read_safetensors(model / "model.safetensors"), path, zipfile.ZIP_DEFLATED)
    if TORCH > 1:
        write_model()
    elif not (FOLDER / "model").exists():
        sys.exit("first run this with torch 2 and transformers, which write the model")
    w = read_safetensors(FOLDER / "model/model.safetensors")
    expected = read_safetensors(FOLDER / "expected.safetensors")
    write_cases(w)
    write_refused()
    (FOLDER / "cases.tsv").write_text("".join("\t".join(case[:3]) + "\n" for case in cases))
    check_cases(expected)
    if TORCH > 1:
        check_hugging_face(expected)


if __name__ == "__main__":
    main()
