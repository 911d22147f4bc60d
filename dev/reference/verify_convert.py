"""Checks convert with the real PyTorch and transformers.

    python dev/reference/verify_convert.py [--convert ./convert] [--fixtures ../shared/fixtures]

1. A random GPT-2 that transformers saves (one file; several; pytorch_model.bin) goes to Megatron and back for several
   splits, orders of Q, K, V and types. torch.load must read every Megatron file, its tensors must be what an
   independent sharder in this script cuts from the model, and GPT2LMHeadModel.from_pretrained must read what comes
   back, with equal logits.
2. Every checkpoint of make_checkpoints.py is converted, loaded with from_pretrained, and its logits are compared.
3. The same for every fixture that is to be accepted.
4. What Hugging Face's own script has written is compared with what convert writes from the same model.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

arguments = argparse.ArgumentParser()
arguments.add_argument("--convert", default="./convert")
arguments.add_argument("--fixtures", default="../shared/fixtures")
arguments = arguments.parse_args()
checks = failures = 0


def check(what, ok):
    global checks, failures
    checks += 1
    failures += not ok
    if not ok:
        print("FAILED:", what)


def convert(*words):
    run = subprocess.run([arguments.convert, *map(str, words)], capture_output=True, text=True)
    check("convert " + " ".join(map(str, words)) + ": " + run.stderr, run.returncode == 0 and not run.stderr)


def load_megatron(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def flatten(model, prefix=""):
    flat = {}
    for key, value in model.items():
        flat.update(flatten(value, prefix + key + ".") if isinstance(value, dict) else {prefix + key: value})
    return flat


def qkv_rows(version, heads, width):
    """Rows of [Q; K; V] in the order of a version: from the definition, one row at a time."""
    q = lambda s, h, j: (s * heads + h) * width + j
    if version == 0:
        return [q(s, h, j) for s in range(3) for h in range(heads) for j in range(width)]
    if version == 1:
        return [q(s, h, j) for h in range(heads) for j in range(width) for s in range(3)]
    return [q(s, h, j) for h in range(heads) for s in range(3) for j in range(width)]


def cut_for_megatron(model, tp, pp, r, stage, version):
    """What rank r of a stage must hold, by torch's own slicing."""
    c, state = model.config, model.state_dict()
    heads, width, depth = c.n_head // tp, c.n_embd // c.n_head, c.n_layer // pp
    flat = {}
    padded = -(-c.vocab_size // (128 * tp)) * 128 * tp
    wte = state["transformer.wte.weight"]
    wte = torch.cat([wte, wte[-1:].expand(padded - len(wte), -1)]).chunk(tp)[r]
    if stage == 0:
        flat["language_model.embedding.word_embeddings.weight"] = wte
        flat["language_model.embedding.position_embeddings.weight"] = state["transformer.wpe.weight"]
    elif stage == pp - 1:
        flat["word_embeddings_for_head.weight"] = wte
    for i in range(depth):
        old, new = f"transformer.h.{stage * depth + i}.", f"language_model.encoder.layers.{i}."
        for ln, norm in (("ln_1", "input_layernorm"), ("ln_2", "post_attention_layernorm")):
            for kind in ("weight", "bias"):
                flat[new + norm + "." + kind] = state[old + ln + "." + kind]
        order = torch.tensor(qkv_rows(version, heads, width))
        for kind in ("weight", "bias"):
            three = state[old + "attn.c_attn." + kind].t().chunk(3) if kind == "weight" else state[old + "attn.c_attn.bias"].chunk(3)
            flat[new + "self_attention.query_key_value." + kind] = torch.cat([x.chunk(tp)[r] for x in three])[order]
        flat[new + "self_attention.dense.weight"] = state[old + "attn.c_proj.weight"].t().chunk(tp, 1)[r]
        flat[new + "self_attention.dense.bias"] = state[old + "attn.c_proj.bias"]
        flat[new + "mlp.dense_h_to_4h.weight"] = state[old + "mlp.c_fc.weight"].t().chunk(tp)[r]
        flat[new + "mlp.dense_h_to_4h.bias"] = state[old + "mlp.c_fc.bias"].chunk(tp)[r]
        flat[new + "mlp.dense_4h_to_h.weight"] = state[old + "mlp.c_proj.weight"].t().chunk(tp, 1)[r]
        flat[new + "mlp.dense_4h_to_h.bias"] = state[old + "mlp.c_proj.bias"]
    if stage == pp - 1:
        for kind in ("weight", "bias"):
            flat["language_model.encoder.final_layernorm." + kind] = state["transformer.ln_f." + kind]
    return flat


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits


def random_model_cases(folder):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=301, n_positions=48, n_embd=96, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    tokens = torch.randint(0, 301, (2, 48))
    model.save_pretrained(folder + "/one")
    model.save_pretrained(folder + "/several", max_shard_size="200KB")
    os.mkdir(folder + "/bin")
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder + "/bin")
    torch.save(model.state_dict(), folder + "/bin/pytorch_model.bin")
    wanted = {"fp32": model, "fp16": None, "bf16": None}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        wanted[name] = GPT2LMHeadModel(config)
        wanted[name].load_state_dict(model.state_dict())
        wanted[name] = wanted[name].to(dtype)
    for source in ("one", "several", "bin"):
        for tp, pp, version, dtype in ((1, 1, 3, "fp32"), (2, 1, 0, "fp32"), (4, 2, 1, "fp16"), (2, 4, 2, "bf16"), (1, 2, 3, "fp16")):
            name = f"{source}_{tp}_{pp}_{version}_{dtype}"
            there, back = folder + "/m_" + name, folder + "/h_" + name
            convert(folder + "/" + source, there, "--tp", tp, "--pp", pp, "--qkv-version", version, "--dtype", dtype)
            for stage in range(pp):
                for r in range(tp):
                    rank = f"mp_rank_{r:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                    file = load_megatron(f"{there}/release/{rank}/model_optim_rng.pt")
                    got, cut = flatten(file["model"]), cut_for_megatron(wanted[dtype], tp, pp, r, stage, version)
                    check(f"{name} {rank}: names", set(got) == set(cut))
                    check(f"{name} {rank}: tensors", all(torch.equal(got[k], cut[k]) and got[k].dtype == cut[k].dtype for k in cut))
                    check(f"{name} {rank}: args", file["args"].num_layers == 4 and file["args"].rank == stage * tp + r and file.get("checkpoint_version", 0) == version)
            convert(there, back)
            loaded = GPT2LMHeadModel.from_pretrained(back, torch_dtype="auto")  # as stored, also before transformers 5
            check(f"{name}: type", loaded.dtype == wanted[dtype].dtype)
            check(f"{name}: logits", torch.equal(logits(loaded.float(), tokens), logits(upcast(wanted[dtype], config), tokens)))
    print("random model: logits of every conversion there and back are bit-equal to the original's")


def upcast(model, config):
    copy = GPT2LMHeadModel(config)
    copy.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    return copy


def fixture_cases(folder):
    root = arguments.fixtures
    manifest = json.load(open(root + "/manifest.json"))
    tokens = torch.frombuffer(bytearray(open(root + "/expected/tiny4_tokens.i32", "rb").read()), dtype=torch.int32).long()[None]
    reference = torch.frombuffer(bytearray(open(root + "/expected/tiny4_logits_fp32model.f32", "rb").read()), dtype=torch.float32).view(32, 380)
    worst = {}
    for f in manifest["fixtures"]:
        out = folder + "/f_" + f["name"]
        if f["kind"] == "hf":
            extra = ["--to", "hf"]
        else:
            extra = ["--config", root + "/" + f["needs_config"]] if f.get("needs_config") else ["--vocab-size", f["vocab_size"]]
        convert(root + "/" + f["path"], out, *extra)
        # the reference was computed with the tanh formula; args of most fixtures ask for the erf
        model = GPT2LMHeadModel.from_pretrained(out, activation_function="gelu_new").float()
        error = (logits(model, tokens)[0] - reference).abs().max().item()
        worst[f["dtype"]] = max(worst.get(f["dtype"], 0), error)
        state = model.state_dict()
        for line in open(root + "/" + f["expected"]):
            name, shape, digest = line.split()
            got = hashlib.sha256(state[name].contiguous().numpy().tobytes()).hexdigest()
            check(f"{f['name']}: {name}", got == digest)
    for dtype, error in worst.items():
        print(f"fixtures of {dtype}: logits differ from PyTorch's of the fp32 model by {error:.3g} at most")
        check("logits of " + dtype, error < {"fp32": 1e-4, "fp16": 0.05, "bf16": 0.5}[dtype])
    for f in manifest["hf_to_megatron"]:
        out = folder + "/x_" + f["name"]
        convert(root + "/" + f["source"], out, "--tp", f["tp"], "--pp", f["pp"], "--dtype", f["dtype"])
        for shard in f["shards"]:
            got = flatten(load_megatron(out + "/" + shard["dir"] + "/model_optim_rng.pt")["model"])
            for t in shard["tensors"]:
                if t["name"].startswith("word_embeddings_for_head") and f["pp"] == 1:
                    continue  # the script writes one although the only stage has the embedding
                value = got.get(t["name"])
                check(f"{f['name']}: {t['name']}", value is not None and hashlib.sha256(value.float().contiguous().numpy().tobytes()).hexdigest() == t["sha256_as_f32"])
    print("Hugging Face's script and convert write the same tensors")


def own_cases(folder):
    """make_checkpoints.py wrote one model in all of them, so all have its logits; the activation is what they tell."""
    root = os.path.dirname(os.path.abspath(__file__)) + "/checkpoints"
    expected, worst = load_file(root + "/expected.safetensors"), 0
    for line in open(root + "/cases.tsv"):
        name, dtype, told = line.rstrip("\n").split("\t")
        if dtype != "refused":
            convert(root + "/" + name, folder + "/" + name, *told.split())
            model = GPT2LMHeadModel.from_pretrained(folder + "/" + name, torch_dtype="auto").double()
            wanted = expected["logits." + dtype].double()
            seen = logits(model, expected["tokens"].long()[None])[0]
            worst = max(worst, ((seen - wanted).norm() / wanted.norm()).item())
    print(f"checkpoints of make_checkpoints.py: logits differ by {worst:.2g} of their norm at most")
    check("logits of checkpoints", worst < 6e-8)  # half a float's epsilon: so they were rounded


transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    random_model_cases(folder)
    own_cases(folder)
    if os.path.isdir(arguments.fixtures):
        fixture_cases(folder)
    else:
        print("skipped: there are no fixtures in", arguments.fixtures)
print(f"torch {torch.__version__}, transformers {transformers.__version__}: {checks} checks, {failures} failed")
sys.exit(failures > 0)
