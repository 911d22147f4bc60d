"""The usual way from Megatron to Hugging Face: load all of it, permute, save all of it.

    convert_torch.py MODEL.pt OUT LAYERS HEADS

Prints the nanoseconds that this takes, without Python's start and the imports. It knows the names and the order of
Q, K, V (version 3) that convert writes for one rank.
"""

import os
import sys
import time

import torch

source, out, layers, heads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
start = time.monotonic_ns()
model = torch.load(source, map_location="cpu", weights_only=False)["model"]["language_model"]
embedding, encoder = model["embedding"], model["encoder"]
result = {
    "transformer.wte.weight": embedding["word_embeddings"]["weight"][:50257].clone(),
    "transformer.wpe.weight": embedding["position_embeddings"]["weight"],
}
names = {
    "input_layernorm": "ln_1",
    "self_attention.query_key_value": "attn.c_attn",
    "self_attention.dense": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.dense_h_to_4h": "mlp.c_fc",
    "mlp.dense_4h_to_h": "mlp.c_proj",
}
for i in range(layers):
    for theirs, ours in names.items():
        for part in "weight", "bias":
            x = encoder["layers.%d.%s.%s" % (i, theirs, part)]
            if ours == "attn.c_attn":
                x = x.view(heads, 3, -1, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
            result["transformer.h.%d.%s.%s" % (i, ours, part)] = x.t().contiguous() if x.dim() == 2 else x
for part in "weight", "bias":
    result["transformer.ln_f." + part] = encoder["final_layernorm." + part]
os.mkdir(out)
torch.save(result, out + "/pytorch_model.bin")
print(time.monotonic_ns() - start)
