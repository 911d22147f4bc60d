#!/usr/bin/env python3
"""PyTorch's side of gpu.sh: the operators and training steps of gpu.cu, in records of the same form.

    gpu_peer.py operators PRECISION CONFIG B
    gpu_peer.py step PRECISION CONFIG B DROPOUT TP=1

The peer is what a user of PyTorch would run: SDPA, torch.compile, autocast over float weights, fused AdamW. step also
runs gpu.cu's program, and takes turns with it, round by round, so that both meet the same clocks and temperatures. If
PyTorch fails, a note says why, and that program goes on alone."""
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer_gpt2 import CONFIGS, GPT2

WARMUP, ROUNDS, STEPS = 3, 9, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def record(**values):
    pairs = (f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    print("who=pytorch", *pairs, flush=True)


def note(name, text):
    record(kind="note", name=name, text="_".join(text.split())[:200])


def of(ms):
    return {"ms": float(sorted(ms)[len(ms) // 2]), "ms_least": float(min(ms))}


def timed(run):
    """Milliseconds of run()."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def operators(precision, config, B):
    """Products alone, without bias or GeLU, and attention."""
    _, C, T, V = CONFIGS[config]
    N, dtype = B * T, torch.bfloat16 if precision == "bf16" else torch.float32
    flood = torch.zeros(1 << 14 if config == "tiny" else 1 << 27, device=DEVICE)

    def normal(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=dtype)

    def measure(name, run):
        ms = []
        for _ in range(WARMUP + ROUNDS):
            flood.sum()  # empties the cache; while it lasts, the host puts run() into the stream
            ms.append(timed(run))
        record(precision=precision, kind="operator", name=name, **of(ms[WARMUP:]))

    for where, inputs, outputs in (("qkv", C, 3 * C), ("proj", C, C), ("fc", C, 4 * C), ("out", 4 * C, C),
                                   ("logits", C, V)):
        x, w, dy = normal(N, inputs), normal(outputs, inputs) * 0.02, normal(N, outputs)
        measure(f"linear{'_gelu' * (where == 'fc')}_forward/{where}", lambda: x @ w.t())
        measure(f"{'gelu_' * (where == 'out')}linear_backward/{where}", lambda: (dy @ w, dy.t() @ x))

    # auto is what PyTorch chooses by itself; in float there is no flash attention to ask for
    auto = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    flash = [SDPBackend.FLASH_ATTENTION] if precision == "bf16" else auto
    for suffix, backends, p in (("", flash, 0.0), ("/dropout", flash, 0.1), ("/auto", auto, 0.0)):
        qkv = [normal(B, T, C // 64, 64).transpose(1, 2).requires_grad_() for _ in range(3)]
        dout = normal(B, T, C // 64, 64).transpose(1, 2)
        try:
            with sdpa_kernel(backends):
                out = F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=p)
                measure("attention_forward" + suffix,
                        lambda: F.scaled_dot_product_attention(*qkv, is_causal=True, dropout_p=p))
                measure("attention_backward" + suffix,
                        lambda: torch.autograd.grad(out, qkv, dout, retain_graph=True))
        except RuntimeError as error:
            note("PyTorch's_attention" + suffix, str(error))


def trainer(precision, config, B, dropout):
    """A function that makes one training step and returns its loss."""
    L, C, T, V = CONFIGS[config]
    model = GPT2(L, C, T, V, dropout).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    compiled, tokens = torch.compile(model), torch.randint(0, V, (B, T + 1))

    def step():
        ids = tokens.to(DEVICE)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = compiled(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()
    return step


def steps(precision, config, B, dropout):
    program = [f"build/bench/gpu_{precision}", "step", config, str(B), str(dropout), "1", "paced"]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    step, ms, losses = None, [], []

    def one_round():
        losses.extend(step() for _ in range(STEPS))
        if losses[-1] != losses[-1]:
            raise FloatingPointError("the loss is not a number")

    for line in child.stdout:
        if line.startswith("who="):
            print(line, end="", flush=True)
            continue
        try:  # our turn: after `ready` we begin and warm up, after each `done` we make a round
            if line.strip() == "ready":
                step = trainer(precision, config, B, dropout)
                one_round()
            elif step:
                ms.append(timed(one_round) / STEPS)
        except Exception as error:  # out of memory, no compiler for torch.compile, ..
            note(f"PyTorch_step_{precision}_{config}", f"{type(error).__name__}: {error}")
            step, ms = None, []
            torch.cuda.empty_cache()
        child.stdin.write("\n")
    if ms:
        memory = float(torch.cuda.max_memory_allocated()) if DEVICE == "cuda" else 0.0
        record(precision=precision, kind="step", name=config, **of(ms), batch=B, dropout=f"{dropout:g}", tp=1,
               memory=memory, loss=losses[-1])
    return child.wait()


if __name__ == "__main__":
    what, precision, config, B = *sys.argv[1:4], int(sys.argv[4])
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    note("PyTorch", f"{torch.__version__} on {DEVICE}")
    if what == "operators":
        operators(precision, config, B)
    else:
        sys.exit(steps(precision, config, B, float(sys.argv[5])))
