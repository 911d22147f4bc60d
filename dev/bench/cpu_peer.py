#!/usr/bin/env python3
"""PyTorch's side of cpu.sh: a worker of the conductor in cpu.c, with records of the same form.

    cpu_peer.py version
    cpu_peer.py step ROW CONFIG B T HEADS        training steps: eager, float, AdamW, gradients clipped
    cpu_peer.py attention B H D T..              forward and backward: fused SDPA, its unfused math

The peer is tuned: of AdamW's implementations the fastest is taken, and cpu.sh keeps the allocator from returning
memory to the system after each step."""
import math
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peer_gpt2 import CONFIGS, GPT2

SHORT, LONG = 0.1, 0.3  # seconds: attention and steps are repeated so long
THREADS = len(os.sched_getaffinity(0))


def record(**values):
    print(*(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()))


def turns(work):
    """work is a list of functions: each line on stdin calls the next one."""
    turn = 0
    while sys.stdin.readline():
        work[turn % len(work)](turn < len(work))
        turn += 1
        print("done" if turn % len(work) else "round", flush=True)


def seconds(run, calls):
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def trainer(config, B, T, H):
    """A function that makes one training step."""
    L, C, P, V = CONFIGS[config]
    model = GPT2(L, C, P, V, H=H)
    tokens = torch.randint(0, V, (B, T + 1))
    parameters = list(model.parameters())

    def step(optimizer):
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not a number")

    best = None
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, **kind)
        step(optimizer)  # makes the moments
        time_of_update = min(seconds(optimizer.step, 1) for _ in range(3))
        if best is None or time_of_update < best[0]:
            best = time_of_update, optimizer, kind
    record(kind="info", name="AdamW", text="PyTorch's_" + "".join(f"{k}={v}" for k, v in best[2].items()))
    return lambda: step(best[1])


def steps(row, config, B, T, H):
    state = {}

    def turn(first):
        if first:
            state["step"], state["calls"] = trainer(config, B, T, H), 1
        one = seconds(state["step"], state["calls"])
        record(part="step", name=row, who="pytorch", ms=1e3 * one, work=B * T)
        if first:
            state["calls"] = max(1, math.ceil(LONG / one))

    turns([turn])


def attention(B, H, D, T):
    def turn(_):
        q, k, v = (torch.randn(B, T, H, D).transpose(1, 2).requires_grad_() for _ in range(3))
        dout = torch.randn(B, T, H, D).transpose(1, 2)

        def run():
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), dout)

        for threads in sorted({1, THREADS}):
            torch.set_num_threads(threads)
            for who, backend in (("fused", SDPBackend.FLASH_ATTENTION), ("math", SDPBackend.MATH)):
                with sdpa_kernel([backend]):
                    calls = max(1, math.ceil(SHORT / seconds(run, 1)))
                    record(part="attention", name=T, who=who, threads=threads, ms=1e3 * seconds(run, calls))
    return turn


if __name__ == "__main__":
    torch.manual_seed(1)
    torch.set_num_threads(THREADS)
    if sys.argv[1] == "version":
        print(torch.__version__)
    elif sys.argv[1] == "step":
        steps(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:7]))
    else:
        B, H, D, *lengths = map(int, sys.argv[2:])
        turns([attention(B, H, D, T) for T in lengths])
