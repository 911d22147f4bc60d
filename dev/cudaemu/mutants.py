#!/usr/bin/env python3
"""Do the tests of megatron_gpt2.cu notice a broken line? Breaks one line at a time and runs them.

    make test_gpt2 test_gpt2_double OPT=-O1 && python3 dev/cudaemu/mutants.py [word ..]        in the root

With words, only mutants whose row has one of them. Each mutant is built and tried in a folder of its own, in turn by
twin_operators and twin_models of test_gpt2 (as make test does) and by the checker on the same two records, until one
of them fails. Those that are about order or bounds try the checker first. Two at a time; half an hour for all."""

import concurrent.futures, os, re, shutil, subprocess, sys, tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
UNDEFINED = "thread,bounds,alignment,signed-integer-overflow,shift,integer-divide-by-zero"
COMMON = ["g++", "-std=gnu++17", "-w", "-I.", '-DTWIN_SOURCE="emu.cpp"', "-x", "c++"]

# How to try it, the function, what stands there (once), what stands there instead, what that breaks. Precision fp32 or
# bf16; + tries the checker first.
TABLE = r"""
bf16+ | convert_kernel | if (i < n) to[i] | to[i] | bound of a thread for each number
fp32+ | block_reduce | __syncthreads();\n    for | for | barrier: sums of warps are read before they stand there
fp32+ | block_reduce | __syncthreads();\n} | } | last barrier: the next reduction overwrites what is read
fp32  | block_reduce | other > 0 | other > 1 | last shuffle
fp32  | keep_four | index / 4 + 1 | index / 4 | dropout: the second block of philox
bf16  | apply_mask | index + i | index | dropout: the second four of eight
fp32  | apply_mask | m.d.first + index | index | dropout: where the rank's slice begins
fp32+ | column_sums_kernel | __syncthreads(); | | barrier
fp32+ | column_sums_kernel | if (column < C) part | part | bound of columns
fp32  | column_sums_kernel | mask, at) | mask, at - c) | dropout index without the column
fp32  | column_sums_kernel | n += SUM_WARPS | n += chunk | rows of a chunk after the first eight
fp32+ | add_parts_kernel | __syncthreads(); | | barrier
fp32+ | add_parts_kernel | c < columns && | | bound of columns
fp32  | add_parts_kernel | db2 + (c - C) | db2 + c | shifted index
fp32  | bias_gelu_kernel | gelu(v[i], kind) | gelu(v[i], GELU_TANH) | the form of GeLU
fp32  | gelu_slope_kernel | blockDim.x * W | blockDim.x | stride of the walk over a row
fp32  | matmul_epilogue | beta = add | beta = 0 | gradients that replace instead of add
fp32  | matmul_epilogue | set_epilogue(plan->desc, &p, bias, aux); | | a plan's old bias
fp32+ | token_embedding_forward_kernel | if (row < Vp) load | load | tokens that are another rank's
fp32+ | sort_tokens_kernel | __syncthreads();\n        for | for | first barrier
fp32+ | sort_tokens_kernel | __syncthreads();\n    } | } | second barrier
fp32  | sort_tokens_kernel | first + i < n | first + i <= n | order of equal tokens
fp32+ | sort_tokens_kernel | if ((int)threadIdx.x < count) tile | tile | bound of tokens
fp32+ | token_embedding_backward_kernel | __syncthreads(); | | barrier
fp32  | token_embedding_backward_kernel | if (tokens[n] != token) break; | | end of a token's run
fp32+ | token_embedding_backward_kernel | if (c >= C) continue; | | bound of columns
fp32  | position_embedding_forward_kernel | past + n % T | n % T | positions after those in the cache
fp32  | position_embedding_backward_kernel | mask, at); | mask, t * C + c); | dropout index without the sequence
fp32+ | layernorm_row | if (threadIdx.x == 0) { | { | one writer
fp32+ | layernorm_forward_kernel | rstd + n, x | rstd, x | index of the row
fp32+ | layernorm_backward_kernel | sum_b[i * packs + p] = 0; | | sums begin at 0
fp32  | layernorm_backward_kernel | n += gridDim.x | n += N | a block's rows after its first
fp32  | bias_dropout_add_row | index + c | c | dropout index without the row
fp32+ | bias_dropout_add_forward_kernel | residual + at | residual | index of the row
fp32  | bias_dropout_add_layernorm_forward_kernel | res + at, g, b | y + at, g, b | what is normalised
fp32+ | load_four | vectors && r < m.rows && c < columns | vectors && c < columns | bound of rows
fp32  | load_four | c + i < columns | true | bound of columns
fp32+ | multiply_rows | __syncthreads(); /* all threads are done with the old contents */ | | first barrier
fp32+ | multiply_rows | __syncthreads();\n#pragma | \n#pragma | second barrier
fp32+ | accumulate | __syncthreads(); /* p is complete, and all threads are done with the old tile */ | | first barrier
fp32+ | accumulate | __syncthreads();\n#pragma | \n#pragma | second barrier
fp32  | write_columns | c + k < columns) at[k] | true) at[k] | bound of columns
fp32  | head_dropout | b * d.heads | b | dropout index of a head
fp32  | draw_keep | + j0 + 16 | + 16 | dropout index without the key
fp32  | attention_forward_kernel | > i0 + 4 * y + i ? | > i0 + 4 * y + i + 1 ? | causal mask: a token sees the next one
fp32+ | attention_forward_kernel | && query < T)\n | )\n | bound of rows
fp32  | attention_forward_kernel | sum[i] * shrink | sum[i] | online softmax: a new maximum
fp32+ | attention_delta_kernel | if (row < rows && | if ( | bound of rows
fp32  | attention_delta_kernel | (b * H + h) * T | (b + h) * T | order of (B,H,T)
fp32  | attention_backward_q_kernel | j0 <= i0 | j0 < i0 | blocks on the diagonal
fp32+ | attention_backward_q_kernel | query < T ? lse[ | true ? lse[ | bound of rows
fp32+ | attention_backward_kv_kernel | __syncthreads(); /* all threads are done with P */ | | barrier
fp32  | attention_backward_kv_kernel | x + 16 * j, 4 * y + i) | 4 * y + i, x + 16 * j) | dropout's bits, transposed
bf16+ | flash_forward_kernel | __syncthreads();\n    Owned | Owned | barrier before the owned rows are read
bf16+ | flash_forward_kernel | __syncthreads(); /* this stage | /* this stage | barrier of a stage
bf16+ | flash_forward_kernel | cp_async_wait<0>();\n        __sync | __sync | wait for a stage's copies
bf16  | flash_forward_kernel | sum[m][half] *= shrink; | | online softmax: a new maximum
bf16  | flash_forward_kernel | __shfl_xor_sync(ALL_LANES, all, 2) | 0 | sum over a row's four lanes
bf16  | mask_future | ahead > below) | ahead > below + 1) | causal mask, rows are queries
bf16  | mask_future | ahead + below > 0 | ahead + below > 1 | causal mask, rows are keys
bf16+ | load_rows | r < from.rows) | true) | bound of rows
bf16+ | load_pair | cp_async_commit(); | | group of copies
bf16  | multiply_nt | lane / 8 % 2 * 8 | lane / 8 % 2 * 4 | shifted index of a tile
bf16  | multiply_nn | i % 2 * 2 | i % 2 | order of a tile's words
bf16  | keep_by_rows | (bits & 12) << 2 | (bits & 12) | dropout's bits of the next tile
bf16  | keep_by_columns | (lane & ~12) \| e << 2 | (lane & ~12) \| e << 1 | the lane that drew the bits
bf16+ | write_rows | __syncwarp(); /* the last products no longer read the rows */ | | first __syncwarp
bf16+ | write_rows | __syncwarp();\n    for | for | second __syncwarp
bf16+ | write_rows | if (r < valid) | | bound of rows
bf16+ | flash_backward_q_kernel | __syncthreads(); /* this stage | /* this stage | barrier of a stage
bf16  | flash_backward_q_kernel | stage ^= 1) | stage ^= 0) | the stage that is read
bf16+ | flash_backward_kv_kernel | __syncthreads(); /* this stage | /* this stage | barrier of a stage
bf16+ | flash_backward_kv_kernel | statistics[stage]) | statistics[0]) | the statistics' stage
bf16+ | query_statistics | i < T ? | true ? | bound of rows
fp32  | append_kernel | past + blockIdx.x | blockIdx.x | where the cache goes on
fp32+ | attention_cached_forward_kernel | __syncthreads(); | | barrier
fp32  | attention_cached_forward_kernel | j <= past + i | j < past + i | a token sees itself
fp32+ | attention_cached_forward_kernel | \|\| column + c >= D) | ) | bound of columns
fp32  | logits_max_kernel | if (v + i < valid && | if ( | padding of the vocabulary
fp32  | logits_sum_exp_kernel | if (v + i < valid) | | padding of the vocabulary
fp32+ | logits_sum_exp_kernel | target < valid ? | true ? | targets that are another rank's
fp32+ | cross_entropy_loss_kernel | if (n < N) | | bound of rows
fp32  | cross_entropy_backward_kernel | v + i < valid ? | true ? | padding of the vocabulary
fp32  | cross_entropy_backward_kernel | v + i == target | v + i + 1 == target | shifted index
fp32+ | adamw_kernel | if (i >= n) return; | | bound of parameters
bf16  | adamw_kernel | if (master) store(master + i, p); | | master weights
fp32  | sum_squares_kernel | gridDim.x * blockDim.x * W | blockDim.x * W | stride over all blocks
fp32+ | reduce_slice_kernel | if (i >= n) return; | | bound of the slice
fp32  | reduce_slice_kernel | x[r] + begin + i, total) | x[r] + i, total) | where the slice is written
fp32  | reduce_slice_kernel | load(next, (const T *)x[r] | load(next, (const T *)x[ranks - r] | order of the ranks
fp32  | wide | C % WIDE == 0 && | | rows that are no multiple of WIDE
fp32+ | device_zero | gpu()->stream | 0 | stream order
fp32+ | device_download | device_synchronize(); | | wait for the stream
"""


def read_table():
    """Rows of the table; \\| stands for | in the code, \\n for a new line."""
    for row in TABLE.strip().split("\n"):
        how, *rest = [cell.strip().replace("\\|", "|").replace("\\n", "\n") for cell in re.split(r"(?<!\\)\|", row)]
        assert len(rest) == 4, row
        yield (how[:4], how.endswith("+"), *rest)


def mutate(text, function, old, new):
    """The text with one place of one function changed."""
    begin = re.search(r"\b%s\((?:(?!\*/)[^;{}])*\)\s*\{" % function, text)
    end = text.index("\n", text.index("}\n", begin.start())) if begin else 0
    if begin and text[begin.end()] == "\n": end = text.index("\n}\n", begin.start()) + 3
    if not begin or text.count(old, begin.start(), end) != 1:
        sys.exit(f"{function} does not have once: {old}")
    return text[:begin.start()] + text[begin.start():end].replace(old, new) + text[end:]


def run(command, folder, seconds=600):
    """Whether it ended with status 0, and what it wrote to stderr, else to stdout."""
    try:
        p = subprocess.run(command, cwd=folder, capture_output=True, errors="replace", timeout=seconds)
        return p.returncode == 0, (p.stderr.strip() or p.stdout.strip())
    except subprocess.TimeoutExpired:
        return False, "timeout"


def build(folder, precision, checked):
    flags = ["-O1", "-DPRECISION_" + precision.upper()]
    if checked: flags += ["-g", "-DCUDACHECK", "-fsanitize=" + UNDEFINED, "-fno-sanitize-recover=all"]
    steps = [COMMON[:3] + flags + COMMON[3:] + ["-c", "test_gpt2.c", "-o", "twin.o"]]
    if checked:
        renamed = [f"--redefine-sym={f}=__tsan_{f}" for f in ("memcpy", "memmove", "memset")]
        steps.append(["objcopy", *renamed, "twin.o"])
    engine = os.path.join(os.path.dirname(folder), "cudacheck.o" if checked else "cudaemu.o")
    program = "checked" if checked else "test_twin_" + precision
    steps.append(["g++", "twin.o", engine, "-o", program, "-lpthread", "-ldl"])
    for step in steps:
        ok, said = run(step, folder)
        if not ok: sys.exit("a mutant does not compile: " + said)


def attempt(scratch, number, text, precision, check_first):
    """What notices that this is not the program, or None."""
    folder = os.path.join(scratch, str(number))
    os.mkdir(folder)
    for name in ("megatron_gpt2.c", "test_gpt2.c", "dev"):
        os.symlink(os.path.join(ROOT, name), os.path.join(folder, name))
    with open(os.path.join(folder, "twin.cu"), "w") as f: f.write(text)
    with open(os.path.join(folder, "emu.cpp"), "w") as f:
        subprocess.run(["sed", "-f", "dev/cudaemu/cu2cpp.sed", "twin.cu"], cwd=folder, stdout=f, check=True)
    test = os.path.join(ROOT, "test_gpt2" if precision == "fp32" else "test_gpt2_double")
    found = None
    for checked in (check_first, not check_first):
        build(folder, precision, checked)
        for what in ("operators", "models"):
            ok, said = run(["./checked", what] if checked else [test, "twin_" + what], folder)
            line = next((s for s in said.split("\n") if "cudacheck" in s), said[-70:])
            if not ok: found = f"check {what}: {line[:70]}" if checked else "twin_" + what
            if found: break
        if found: break
    shutil.rmtree(folder)
    return found


def main():
    with open(os.path.join(ROOT, "megatron_gpt2.cu")) as f: source = f.read()
    rows = [(f"{p} {function}: {what}", mutate(source, function, old, new), p, check)
            for p, check, function, old, new, what in read_table()]
    if len(sys.argv) > 1: rows = [r for r in rows if any(word in r[0] for word in sys.argv[1:])]
    scratch, survivors = tempfile.mkdtemp(), []
    for name in ("cudaemu", "cudacheck"):
        subprocess.run(["g++", "-std=gnu++17", "-O2", "-w", "-c", f"dev/cudaemu/{name}.cpp", "-o",
                        os.path.join(scratch, name + ".o")], cwd=ROOT, check=True)
    for precision in sorted({r[2] for r in rows}):
        found = attempt(scratch, 0, source, precision, False)
        if found: sys.exit(f"the program as it is fails, in {precision}: {found}")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        tried = {pool.submit(attempt, scratch, i, *r[1:]): r[0] for i, r in enumerate(rows)}
        for done in concurrent.futures.as_completed(tried):
            found = done.result()
            if not found: survivors.append(tried[done])
            print(f"{tried[done]:<90} {found or 'SURVIVED'}", flush=True)
    shutil.rmtree(scratch)
    for name in survivors: print("survived:", name)
    print(f"{len(rows)} mutants, {len(rows) - len(survivors)} caught, {len(survivors)} survived")


if __name__ == "__main__":
    main()
