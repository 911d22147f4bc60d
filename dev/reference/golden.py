#!/usr/bin/env python3
"""Golden values for test_gpt2.c: what PyTorch and transformers say a small GPT-2 computes.

    python3 golden.py            writes golden/tanh and golden/erf beside this file (README.md has the versions)

Each folder is an ordinary Hugging Face GPT-2 (config.json, model.safetensors), plus golden.safetensors. Names are the
Hugging Face names without "transformer."; layouts are Hugging Face's, so that Conv1D weights are (in, out).

    tokens        I32 (B, T+1)      inputs [:, :-1], targets [:, 1:]
    logits        F32 (B, T, V)
    loss          F32 (1)           mean cross entropy over the B*T targets
    grad.NAME     F32               d loss / d NAME, not clipped; wte has both its gradients, as input and as output
    grad_norm     F32 (1)           2-norm of all of them, wte counted once
    clip          F32 (1)           half of grad_norm: the bound of the training run below
    after3.NAME   F32               weights after three steps of AdamW on this same batch
    loss3         F32 (4)           the loss before each step, and after the last
    generate      I32 (n_positions) tokens[0][:4] and its greedy continuation

One part of after3 is not for comparison in float32: elements [C, 2C) of c_attn.bias, the key biases. Their gradient
is zero, softmax being blind to them, and Adam blows up whatever rounding leaves in its place: g/(sqrt(v)+eps) is of
order 1 for a g of 1e-8. They move by up to 3*lr, and the loss does not notice.

Every sum runs in float64, from weights that float32 holds exactly, and is rounded to float32 once, when written. The
error that a float32 program measures against these numbers is therefore its own. What is written is also checked
against a second opinion, the NumPy transformer below, which shares nothing with PyTorch but the weights.
"""
import copy
import math
import pathlib
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

# Two shapes that a program cannot confuse. "erf" differs in all that is easily hard-coded: GELU, epsilon, the inner
# width, a batch shorter than the position table, sizes that are no power of two.
MODELS = {
    "tanh": dict(seed=1909, batch=2, time=16, n_layer=2, n_head=4, n_embd=32, n_inner=None, n_positions=16,
                 vocab_size=61, activation_function="gelu_new", layer_norm_epsilon=1e-5),
    "erf": dict(seed=8053, batch=2, time=9, n_layer=1, n_head=2, n_embd=24, n_inner=40, n_positions=12,
                vocab_size=50, activation_function="gelu", layer_norm_epsilon=1e-6),
}
LR, BETA1, BETA2, EPS, DECAY, STEPS, PROMPT = 1e-3, 0.9, 0.999, 1e-8, 0.01, 3, 4


def short(name):
    return name.removeprefix("transformer.")


def parameters(model):
    """(short name, parameter); the tied lm_head does not come up a second time."""
    return [(short(n), p) for n, p in model.named_parameters()]


def decays(name):
    """Decay is for matrices and both embeddings; biases and LayerNorm go without [§4.2, P31]."""
    return not name.endswith(".bias") and ".ln_" not in "." + name


def make_model(spec):
    """A float32 model in which nothing is 0, 1 or tied by accident, large enough that attention has preferences."""
    shape = {k: v for k, v in spec.items() if k not in ("seed", "batch", "time")}
    last = spec["vocab_size"] - 1
    config = transformers.GPT2Config(**shape, bos_token_id=last, eos_token_id=last, attn_implementation="eager")
    model = transformers.GPT2LMHeadModel(config)
    rng = np.random.Generator(np.random.PCG64(spec["seed"]))
    for name, p in parameters(model):
        x = rng.standard_normal(tuple(p.shape))
        if name.startswith("w"):                           # wte, wpe
            x *= 0.2
        elif ".ln_" in "." + name and name.endswith("weight"):
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x *= 0.1
        else:  # wider than what keeps the variance through the product
            x *= 1.5 / math.sqrt(p.shape[0])
        p.data = torch.from_numpy(x.astype(np.float32))
    tokens = rng.integers(0, last + 1, (spec["batch"], spec["time"] + 1))
    tokens[0, 5] = tokens[0, 4]                            # a row of wte that gathers several gradients,
    tokens[1, 2], tokens[1, 3] = 0, last                   # and both ends of the table
    return model.eval(), tokens                            # eval: config.json says dropout 0.1, this run has none


def loss_of(model, tokens):
    """transformers' own loss goes through float32, so the cross entropy is taken from the logits here."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), logits


def train(model, tokens, clip):
    """torch decays first, p -= lr*decay*p, and then steps, p -= lr*m/(sqrt(v)+eps), m and v bias-corrected: the
    paper's p -= lr*(m/(sqrt(v)+eps) + decay*p), the same number but for rounding: m and v do not see the decay."""
    named = parameters(model)
    groups = [dict(params=[p for n, p in named if decays(n)], weight_decay=DECAY),
              dict(params=[p for n, p in named if not decays(n)], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(BETA1, BETA2), eps=EPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _ = loss_of(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(loss_of(model, tokens)[0].item())
    return losses


def gradients(model, tokens):
    model.zero_grad()
    loss, logits = loss_of(model, tokens)
    loss.backward()
    return loss.item(), logits.detach().numpy(), {n: p.grad.numpy().copy() for n, p in parameters(model)}


def flush_noise(name, g, C):
    """Softmax does not see a constant added to a row of scores, so the gradient of the key bias is zero; float64
    leaves 1e-18 or so there. The golden value is the zero. Nothing else may be as small and not be zero."""
    noise = (g != 0) & (np.abs(g) < 1e-14)
    if name.endswith("c_attn.bias"):
        assert np.abs(g[C:2 * C]).max() < 1e-14 and not noise[:C].any() and not noise[2 * C:].any()
    else:
        assert not noise.any(), name
    return np.where(noise, 0, g)


# ---- The second opinion --------------------------------------------------------------------------------------------

def numpy_forward(w, spec, tokens):
    """GPT-2 in float64, from the paper: logits (B,T,V) of tokens (B,T). w: short name -> array."""
    C, H, eps = spec["n_embd"], spec["n_head"], spec["layer_norm_epsilon"]
    B, T = tokens.shape

    def ln(x, name):
        d = x - x.mean(-1, keepdims=True)
        return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"] + w[name + ".bias"]

    def gelu(x):
        if spec["activation_function"] == "gelu":
            return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for layer in range(spec["n_layer"]):
        at = f"h.{layer}."
        q, k, v = [linear(ln(x, at + "ln_1"), at + "attn.c_attn")[..., i * C:(i + 1) * C] for i in range(3)]
        out = np.zeros_like(x)
        for b in range(B):
            for head in range(H):
                s = slice(head * C // H, (head + 1) * C // H)
                for t in range(T):                                  # one query at a time: causal without any mask
                    score = k[b, :t + 1, s] @ q[b, t, s] / math.sqrt(C // H)
                    p = np.exp(score - score.max())
                    out[b, t, s] = p @ v[b, :t + 1, s] / p.sum()
        x = x + linear(out, at + "attn.c_proj")
        x = x + linear(gelu(linear(ln(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return ln(x, "ln_f") @ w["wte.weight"].T


def numpy_loss(w, spec, tokens):
    z = numpy_forward(w, spec, tokens[:, :-1])
    z = z - z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()


def check_gradients(w, spec, tokens, grads):
    """Central differences of the NumPy loss: along one random direction through the whole of each tensor, and at two
    single elements of it. Largest error, relative to the size of the tensor's gradient."""
    rng = np.random.default_rng(1)
    worst = 0
    for name, g in grads.items():
        directions = [rng.standard_normal(g.shape) / math.sqrt(g.size)]
        for i in rng.choice(g.size, 2, replace=False):
            directions.append(np.zeros(g.shape))
            directions[-1].flat[i] = 1
        for d in directions:
            h = 1e-4                                                # error h^4 in the five-point formula
            f = [numpy_loss({**w, name: w[name] + s * h * d}, spec, tokens) for s in (-2, -1, 1, 2)]
            slope = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
            worst = max(worst, abs(slope - (g * d).sum()) / np.abs(g).max())
    return worst


def numpy_train(model, tokens, clip):
    """[P32] and [P28] as they are printed; only the gradients come from PyTorch. Changes the model's weights."""
    m, v = {}, {}
    for step in range(1, STEPS + 1):
        _, _, grads = gradients(model, tokens)
        norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
        scale = min(1, clip / (norm + 1e-6))
        for name, p in parameters(model):
            g, w = grads[name] * scale, p.detach().numpy()          # w shares the parameter's memory
            m[name] = BETA1 * m.get(name, 0) + (1 - BETA1) * g
            v[name] = BETA2 * v.get(name, 0) + (1 - BETA2) * g * g
            m_hat, v_hat = m[name] / (1 - BETA1 ** step), v[name] / (1 - BETA2 ** step)
            w -= LR * (m_hat / (np.sqrt(v_hat) + EPS) + (DECAY * w if decays(name) else 0))


def greedy(w, spec, prompt):
    """Greedy continuation by NumPy, and the smallest lead of a winner over the runner-up."""
    out, lead = list(prompt), math.inf
    while len(out) < spec["n_positions"]:
        z = numpy_forward(w, spec, np.array([out]))[0, -1]
        second, first = np.sort(z)[-2:]
        lead = min(lead, first - second)
        out.append(int(z.argmax()))
    return out, lead


# ---- One folder ----------------------------------------------------------------------------------------------------

def report(what, measured, bound):
    print(f"    {what:<66} {measured:9.2e} <= {bound:.0e}")
    assert measured <= bound, what


def distance(a, b):
    """Largest difference over tensors, each relative to its largest element."""
    return max(np.abs(a[n] - b[n]).max() / np.abs(b[n]).max() for n in b)


def make_folder(name, spec, folder):
    folder.mkdir(parents=True, exist_ok=True)
    single, tokens = make_model(spec)
    single.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)     # defaults of generate(), no part of the model
    model = copy.deepcopy(single).double()
    w = {n: p.detach().numpy().copy() for n, p in parameters(model)}
    batch = torch.from_numpy(tokens)

    loss, logits, raw = gradients(model, batch)
    grads = {n: flush_noise(n, g, spec["n_embd"]) for n, g in raw.items()}
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    clip = float(np.float32(norm / 2))                              # trained with the value that is written

    generated = model.generate(batch[:1, :PROMPT], attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
                               do_sample=False, max_length=spec["n_positions"],
                               pad_token_id=spec["vocab_size"] - 1)[0].tolist()
    trained, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    losses = train(trained, batch, clip)
    after = {n: p.detach().numpy() for n, p in parameters(trained)}

    print(f"{name}: {sum(p.size for p in w.values())} parameters, loss {' '.join(f'{x:.6f}' for x in losses)}, "
          f"grad_norm {norm:.6f}, generate {generated}")
    report("logits, PyTorch against NumPy, largest difference",
           np.abs(numpy_forward(w, spec, tokens[:, :-1]) - logits).max(), 1e-12)
    report("loss", abs(numpy_loss(w, spec, tokens) - loss), 1e-13)
    report("gradients against central differences", check_gradients(w, spec, tokens, grads), 1e-8)
    numpy_train(by_hand, batch, clip)                               # off by the key biases' noise: LR * 1e-17 / EPS
    report("weights after three steps against [P32] and [P28] by hand",
           max(np.abs(after[n] - p.detach().numpy()).max() for n, p in parameters(by_hand)), 1e-11)
    continued, lead = greedy(w, spec, tokens[0, :PROMPT])
    assert generated == continued and spec["vocab_size"] - 1 not in continued and len(set(continued)) >= 6
    report("greedy: 1e-3 over the smallest lead of a winner", 1e-3 / lead, 1)

    def as_float32(x):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))

    golden = {"tokens": torch.from_numpy(tokens.astype(np.int32)), "logits": as_float32(logits),
              "loss": as_float32([loss]), "grad_norm": as_float32([norm]), "clip": as_float32([clip]),
              "loss3": as_float32(losses), "generate": torch.tensor(generated, dtype=torch.int32)}
    golden.update({"grad." + n: as_float32(g) for n, g in grads.items()})
    golden.update({"after3." + n: as_float32(p) for n, p in after.items()})
    save_file(golden, folder / "golden.safetensors")

    # The folder as a reader finds it, and how far PyTorch itself is off in float32: the measure for a test's bounds.
    again = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(parameters(again), parameters(single)))
    golden = {n: x.numpy() for n, x in load_file(folder / "golden.safetensors").items()}
    loss, logits, grads = gradients(again, batch)
    print(f"    PyTorch in float32: logits {np.abs(logits - golden['logits']).max():.1e}"
          f" loss {abs(loss - golden['loss'][0]):.1e}"
          f" gradients {distance(grads, {n: golden['grad.' + n] for n in grads}):.1e}", end="")
    losses = train(again, batch, clip)
    off = {n: np.abs(p.detach().numpy() - golden["after3." + n]) for n, p in parameters(again)}
    C, keys = spec["n_embd"], 0
    for x in (x for n, x in off.items() if n.endswith("c_attn.bias")):
        keys = max(keys, x[C:2 * C].max())
        x[C:2 * C] = 0
    print(f" loss3 {np.abs(losses - golden['loss3']).max():.1e}"
          f" after3 {max(x.max() for x in off.values()):.1e}, its key biases {keys:.1e}")


def main():
    torch.set_num_threads(1)                                        # one order of summation: the files repeat
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}")
    for name, spec in MODELS.items():
        make_folder(name, spec, pathlib.Path(__file__).parent / "golden" / name)


if __name__ == "__main__":
    main()
