#!/usr/bin/env python3
"""Makes the small, valid inputs in corpus/, for the fuzz targets to start from.

    python3 dev/fuzz/make_corpus.py

No PyTorch is needed: what torch.save writes is a pickle of standard library objects and of a few names, which are
invented below."""

import argparse, collections, io, json, os, pickle, struct, sys, types, zlib

CORPUS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "corpus")
C, H, F, P, V = 4, 2, 8, 3, 5  # the model: channels, heads, width of the MLP, positions, tokens


def put(target, name, *parts):
    os.makedirs(os.path.join(CORPUS, target), exist_ok=True)
    with open(os.path.join(CORPUS, target, name), "wb") as f:
        f.write(b"\n%%\n".join(p.encode() if isinstance(p, str) else p for p in parts))


# ---- torch.save --------------------------------------------------------------------------------------------------


def invent(module, name):
    """A class or function that pickle finds under this name."""
    here = sys.modules.setdefault(module, types.ModuleType(module))
    thing = type(name, (), {"__module__": module, "__qualname__": name})
    setattr(here, name, thing)
    return thing


invent("torch", "float16")
rebuild = {n: invent("torch._utils", n) for n in ("_rebuild_tensor_v2", "_rebuild_parameter")}
SIZE = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8}
STORAGE = {n: invent("torch", n + "Storage") for n in SIZE}


class Storage:
    def __init__(self, kind, n, first=0):
        self.kind, self.n, size = kind, n, SIZE[kind]
        self.data = bytes((3 * i + first) % 47 if (i + 1) % size else 60 for i in range(n * size))  # all finite


class Called:
    """Pickled as the call of a name."""

    def __init__(self, name, *args):
        self.args = name, args

    def __reduce__(self):
        return self.args


def tensor(shape, kind="Half", first=0, strides=None, storage=None, offset=0):
    n = 1
    for s in shape:
        n *= s
    contiguous = tuple(shape[1:]) + (1,) if len(shape) == 2 else (1,)
    storage = storage or Storage(kind, n, first)
    return Called(rebuild["_rebuild_tensor_v2"], storage, offset, tuple(shape), strides or contiguous, False,
                  collections.OrderedDict())


class Pickler(pickle._Pickler):
    """Puts storages beside the pickle. The calls are compared by name only, as pickle does with functions."""

    def __init__(self, f, storages, views):
        super().__init__(f, 2)
        self.storages, self.views = storages, views

    def persistent_id(self, it):
        if not isinstance(it, Storage):
            return None
        if it not in self.storages:
            self.storages.append(it)
        key = str(self.storages.index(it))
        return ("storage", STORAGE[it.kind], key, "cpu", it.n) + ((None,) if self.views else ())

    def save_reduce(self, func, args, *more, obj=None, **named):
        if isinstance(obj, Called):  # not memoised by identity of its arguments
            self.save(func), self.save(args), self.write(pickle.REDUCE)
        else:
            super().save_reduce(func, args, *more, obj=obj, **named)


def pickled(it, views=False):
    f, storages = io.BytesIO(), []
    Pickler(f, storages, views).dump(it)
    return f.getvalue(), storages


def legacy(it):
    program, storages = pickled(it, views=True)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    out = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, system)] + [program]
    out.append(pickle.dumps([str(i) for i in range(len(storages))], 2))
    return b"".join(out + [struct.pack("<Q", s.n) + s.data for s in storages])


def zipped(members, deflate=False, crc=True, wide=False, comment=b""):
    """An archive. crc False: the checksums are 0, which means unknown. wide: all sizes are in 64-bit fields."""
    body, directory = b"", b""
    for name, data in members:
        name = name.encode()
        packed = data
        if deflate:
            z = zlib.compressobj(9, zlib.DEFLATED, -15)
            packed = z.compress(data) + z.flush()
        check, at, full = zlib.crc32(data) if crc else 0, len(body), 0xFFFFFFFF
        head = struct.pack("<HHHHHI", 45, 0, 8 * deflate, 0, 33, check)
        extra = struct.pack("<HHQQQ", 1, 24, len(data), len(packed), at) if wide else b""
        body += b"PK\3\4" + head + struct.pack("<IIHH", len(packed), len(data), len(name), 0) + name + packed
        sizes = (full, full) if wide else (len(packed), len(data))
        directory += b"PK\1\2" + struct.pack("<H", 45) + head + struct.pack("<IIHHHHHII", *sizes, len(name),
                                                                          len(extra), 0, 0, 0, 0,
                                                                          full if wide else at) + name + extra
    n, size, at = len(members), len(directory), len(body)
    end = b""
    if wide:
        end = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, n, n, size, at)
        end += b"PK\6\7" + struct.pack("<IQI", 0, at + size, 1)
        n, size, at = 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF
    end += b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, n, n, size, at, len(comment)) + comment
    return body + directory + end


def container(it, **how):
    program, storages = pickled(it)
    members = [("a/data.pkl", program), ("a/byteorder", b"little"), ("a/version", b"3\n")]
    return zipped(members + [("a/data/%d" % i, s.data) for i, s in enumerate(storages)], **how)


# ---- Models ------------------------------------------------------------------------------------------------------

LAYER = [("input_layernorm", (C,)), ("attention.query_key_value", (3 * C, C)), ("attention.dense", (C, C)),
         ("post_attention_layernorm", (C,)), ("mlp.dense_h_to_4h", (F, C)), ("mlp.dense_4h_to_h", (C, F))]
ROWS = ("query_key_value", "dense_h_to_4h")
COLS = ("attention.dense", "dense_4h_to_h")


def layers(L=1, tp=1, rank=0, rename=lambda name: name, kind="Half"):
    """The tensors of a stage's layers, of one tensor rank."""
    out = collections.OrderedDict()
    for l in range(L):
        for name, shape in LAYER:
            rows, cols = shape if len(shape) == 2 else (shape[0], 0)
            first, bias = 0, rows
            if name.endswith(ROWS):
                rows, bias, first = rows // tp, rows // tp, rank
            if name.endswith(COLS):
                cols, first = cols // tp, rank
            out[rename("layers.%d.%s.weight" % (l, name))] = tensor((rows, cols) if cols else (rows,), kind, first)
            bias_first = rank if name.endswith(ROWS) else 0
            out[rename("layers.%d.%s.bias" % (l, name))] = tensor((bias,), kind, bias_first)
    return out


def final():
    return {"final_layernorm.weight": tensor((C,)), "final_layernorm.bias": tensor((C,))}


def arguments(tp=1, pp=1, rank=0, L=1, **more):
    a = argparse.Namespace(num_layers=L, hidden_size=C, num_attention_heads=H, ffn_hidden_size=F,
                           max_position_embeddings=P, layernorm_epsilon=1e-5, tensor_model_parallel_size=tp,
                           pipeline_model_parallel_size=pp, world_size=tp * pp, rank=rank)
    for key in more:
        setattr(a, key, more[key])
    return a


def embedding(tp=1, rank=0, rows=6):
    return {"word_embeddings": {"weight": tensor((rows // tp, C), first=rank)},
            "position_embeddings": {"weight": tensor((P, C))}}


def megatron(body="encoder", tp=1, pp=1, rank=0, stage=0, L=1, **more):
    modern = lambda name: name.replace(".attention.", ".self_attention.") if body == "encoder" else name
    model, part = {}, layers(L // pp, tp, rank, modern)
    if stage == pp - 1:
        part.update(final())
    language = {"embedding": embedding(tp, rank)} if stage == 0 else {}
    language[body] = part
    model["language_model"] = language
    if stage and stage == pp - 1:
        model["word_embeddings_for_head"] = {"weight": tensor((6 // tp, C), first=rank)}
    return {"args": arguments(tp, pp, stage * tp + rank, L, **more), "checkpoint_version": 3.0, "iteration": 7,
            "model": model}


def core():
    """Megatron-Core with TransformerEngine; what it adds to a state dict; strides."""
    names = {"input_layernorm": "self_attention.linear_qkv.layer_norm_",
             "attention.query_key_value": "self_attention.linear_qkv.",
             "attention.dense": "self_attention.linear_proj.",
             "post_attention_layernorm": "mlp.linear_fc1.layer_norm_", "mlp.dense_h_to_4h": "mlp.linear_fc1.",
             "mlp.dense_4h_to_h": "mlp.linear_fc2."}

    def rename(name):
        for old in names:
            if "." + old + "." in name:
                return "decoder." + name.replace(old + ".", names[old])
        return name

    model = layers(rename=rename)
    whole = Storage("Half", 2 * F * C)
    model["decoder.layers.0.mlp.linear_fc1.weight"] = tensor((F, C), storage=whole, strides=(1, F), offset=F * C)
    model["embedding.word_embeddings.weight"] = tensor((6, C))
    model["embedding.position_embeddings.weight"] = tensor((P, C))
    model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    for name in final():
        model["decoder." + name] = final()[name]
    return {"args": arguments(swiglu=False, normalization="LayerNorm", position_embedding_type="learned_absolute",
                              bias_gelu_fusion=True, num_experts=None, dtype=STORAGE["Half"], big=1 << 70),
            "model": model, "checkpoint_version": 2, "iteration": 1 << 40, "rng_state": [(1, 2), (), -3, "x", None],
            "optimizer": Called(invent("elsewhere", "Optimizer"), {"step": 0.5, "on": False})}


def flat():
    """July 2019: nothing but names and tensors."""
    model = {"word_embeddings.weight": tensor((6, C)), "position_embeddings.weight": tensor((P, C))}
    model.update({"transformer." + k: v for k, v in layers(kind="Float").items()})
    model.update({"transformer." + k: v for k, v in final().items()})
    return {"iteration": 1, "model": model, "mpu": collections.OrderedDict()}


HF = [("wte.weight", (V, C)), ("wpe.weight", (P, C)), ("h.0.ln_1.weight", (C,)), ("h.0.ln_1.bias", (C,)),
      ("h.0.attn.c_attn.weight", (C, 3 * C)), ("h.0.attn.c_attn.bias", (3 * C,)), ("h.0.attn.c_proj.weight", (C, C)),
      ("h.0.attn.c_proj.bias", (C,)), ("h.0.ln_2.weight", (C,)), ("h.0.ln_2.bias", (C,)),
      ("h.0.mlp.c_fc.weight", (C, F)), ("h.0.mlp.c_fc.bias", (F,)), ("h.0.mlp.c_proj.weight", (F, C)),
      ("h.0.mlp.c_proj.bias", (C,)), ("ln_f.weight", (C,)), ("ln_f.bias", (C,))]

CONFIG = {"model_type": "gpt2", "n_ctx": P, "n_positions": P, "n_layer": 1, "n_embd": C, "n_head": H, "n_inner": F,
          "vocab_size": V, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "embd_pdrop": 0.1,
          "attn_pdrop": 0.1, "resid_pdrop": 0.1}


def config(**more):
    return json.dumps({**CONFIG, **more})


def bins(prefix, mask=False):
    model = collections.OrderedDict((prefix + n, tensor(shape, "Float")) for n, shape in HF)
    if mask:
        model[prefix + "h.0.attn.bias"] = tensor((1, 1), "Double")
        model[prefix + "h.0.attn.c_proj.bias"] = Called(rebuild["_rebuild_parameter"], tensor((C,), "Float"), True,
                                                       collections.OrderedDict())
    return legacy(model)


def safetensors(names, dtype="F16", metadata=None):
    size, header, data = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[dtype], {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for i, (name, shape) in enumerate(names):
        n = shape[0] * (shape[1] if len(shape) == 2 else 1)
        first = 0 if name == "lm_head.weight" else i
        one = bytes((3 * j + first) % 47 if (j + 1) % size else 60 for j in range(n * size))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(one)]}
        data += one
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def indexed(width, docs):
    kind = {2: 8, 4: 4}[width]
    ends = [0]
    for d in docs:
        ends.append(ends[-1] + len(d) * width)
    idx = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, kind, len(docs), len(docs) + 1)
    idx += b"".join(struct.pack("<i", len(d)) for d in docs)
    idx += b"".join(struct.pack("<q", e) for e in ends[:-1])
    idx += b"".join(struct.pack("<q", i) for i in range(len(docs) + 1))
    return idx, b"".join(struct.pack("<" + {2: "H", 4: "i"}[width], t) for d in docs for t in d)


def byte_character(b):
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(b) if b in visible else chr(256 + [x for x in range(256) if x not in visible].index(b))


def main():
    put("pickle", "flat_2019", legacy(flat()))
    put("pickle", "transformer", legacy(megatron("transformer")))
    put("pickle", "encoder", legacy(megatron(openai_gelu=False)))
    put("pickle", "two_ranks", *(legacy(megatron(tp=2, rank=r)) for r in range(2)))
    put("pickle", "grid", *(legacy(megatron(tp=2, pp=2, rank=r, stage=s, L=2)) for s in range(2) for r in range(2)))
    weights = {"transformer." + n: "a" for n, _ in HF}
    put("pickle", "hugging_face", config(), json.dumps({"weight_map": weights}), bins("transformer."))
    put("pickle", "mask", bins("", mask=True))
    put("pickle", "strides", legacy({"model": {"x": {"y": tensor((2, 3), strides=(1, 2)), "z": tensor((0,))}}}))
    put("pickle", "small", legacy({"y": tensor((2, 3), strides=(1, 2))}))
    put("zip", "small", container({"y": tensor((2, 3))}, crc=False))
    put("zip", "small_deflated", container({"y": tensor((20, 3))}, deflate=True, crc=False))
    put("zip", "core", container(core()))
    put("zip", "no_checksums", container(megatron(), crc=False))
    put("zip", "deflated", container(megatron(), deflate=True))
    put("zip", "wide", container({"x": tensor((2,))}, wide=True, comment=b"a comment"))
    put("zip", "tree", zipped([("gpt/latest_checkpointed_iteration.txt", b"release\n"),
                               ("gpt/release/mp_rank_00/model_optim_rng.pt", legacy(megatron())),
                               ("gpt/release/", b"")], deflate=True))
    put("zip", "tree_of_two", zipped([("iter_0000007/mp_rank_%02d/model_rng.pt" % r,
                                       container(megatron(tp=2, rank=r), crc=False)) for r in range(2)], crc=False))
    put("safetensors", "file", safetensors(HF))
    put("safetensors", "model", config(), safetensors(HF))
    put("safetensors", "untied", config(tie_word_embeddings=False, activation_function="gelu", n_inner=None),
        safetensors([("transformer." + n, tuple(16 if d == F else d for d in s)) for n, s in HF] +
                    [("lm_head.weight", (V, C)), ("transformer.h.0.attn.masked_bias", (1,))], "BF16"))
    moments = [(p + n, s) for p in ("m.", "v.") for n, s in HF]
    put("safetensors", "trainer", config(), safetensors(HF, "F32"),
        safetensors(moments, "F32", {"format": "pt", "step": "3"}))
    index = {n: "ab"[i > 5] for i, (n, _) in enumerate(HF)}
    put("safetensors", "index", config(), json.dumps({"metadata": {"total_size": 1}, "weight_map": index}),
        safetensors(HF[:6]), safetensors(HF[6:], "F64"))
    put("json", "values", '{"a": [1, -0.5e+3, 1E-2, 0, true, false, null, "", {}], "b\\n": {"": []}}')
    put("json", "strings", '["\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC\\ud83d\\ude00", "\u00e9\u20ac\U0001f600"]')
    put("json", "deep", " " + 39 * "[" + '{"k":\t0}' + 39 * "]" + "\r\n")
    put("json", "number", "-12345678901234567890.5e-300")
    put("config", "full", config(bos_token_id=4, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False))
    put("config", "least",
        '{"model_type":"gpt2","n_ctx":1024,"n_layer":24,"n_embd":1024,"n_head":16,"vocab_size":50257}')
    put("config", "largest", config(n_positions=1 << 20, n_layer=1 << 12, n_embd=1 << 17, n_head=1 << 12,
                                    vocab_size=1 << 24, n_inner=1 << 20, tie_word_embeddings=False, n_ctx=None))
    tokens = [byte_character(b) for b in range(256)]
    merges = ["h e", "t he", "Ġ t", "Ġt he", "a a", "aa aa", "Ã ©", "i n"]
    vocabulary = tokens + [m.replace(" ", "") for m in merges] + ["<|endoftext|>"]
    put("tokenizer", "merges", json.dumps({t: i for i, t in enumerate(vocabulary)}, ensure_ascii=False),
        "#version: 0.2\n" + "\n".join(merges) + "\n", "the aaaaaaa in thé 12 's\n\n  <|endoftext|>\r\n!? the\xa0\u3000")
    put("tokenizer", "bytes", json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False), "",
        b"it's \xff\xfe they'll")
    put("dataset", "text", "A first text.\n\n<|endoftext|>And\ta second one, in UTF-8: \u00e9.<|endoftext|>")
    put("dataset", "index_16", *indexed(2, [[1, 2, 3, 256], [], [7] * 9, [5, 256]]))
    put("dataset", "index_32", *indexed(4, [[65, 66, 67], [256], [0, 255, 1, 2, 3, 4]]))
    put("dataset", "lambada", '{"text": "He went to the house"}\n\n{"x": 1, "text": " two\\u00a0words "}\n')
    put("dataset", "wikitext",
        " \n = = Title = = \n \" It 's ( a ) \" , 1 @,@ 000 @-@ 5 @.@ 5 \u00b0 : N s ' [ x ] ; { } ! ? . \n")


main()
