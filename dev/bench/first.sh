#!/bin/bash
# First contact with an NVIDIA GPU: checks megatron_gpt2.cu, then measures it, in one call of less
# than ten minutes. README.md tells what it prints.
#
#     bash dev/bench/first.sh            on a machine with a GPU and nvcc
#     EMU=1 bash dev/bench/first.sh      without one: kernels emulated, tiny sizes, no true times
#
# Checks come first, the most telling ones before the others. Every step has a time limit. A step
# that fails stops nothing. Results appear as they arrive, and the table comes at the end whatever
# happens: also after Ctrl-C, and when the time is up.
#
# Variables: OUT (build/first), the folder that gets summary, records, table, gpu.json and logs.tgz;
# LIMIT (560), seconds for everything; PYTHON, one that has torch (python3); NVCC, NVCCFLAGS.
# Exit status 1: a step failed, or was not run.
set -u
cd "$(dirname "$0")/../.." || exit 1
export LC_ALL=C PYTHONUNBUFFERED=1 PATH=$PATH:/usr/local/cuda/bin
export EMU=${EMU:-} BIN=build/first_bin WORK=build/first_work
OUT=${OUT:-build/first} LIMIT=${LIMIT:-560} PYTHON=${PYTHON:-python3} failed=0 child=
export NVCC=${NVCC:-nvcc} NVCCFLAGS=${NVCCFLAGS:--O3 -std=c++17 -arch=native -Xcompiler -fopenmp,-w}
export SHAPE="--layers 4 --hidden 256 --heads 4 --seq 256 --steps 12"
model=355M batch=16
[ "$EMU" ] && model=tiny batch=2 SHAPE="--layers 2 --hidden 128 --heads 2 --seq 64 --steps 3"
rm -rf $BIN $WORK
mkdir -p $BIN $WORK build/bench "$OUT" || exit 1
: >"$OUT/summary"
: >"$OUT/records"

# ---- How a step runs
say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$OUT/summary"; }
show() { cut -c 1-160 | sed 's/^/          | /' | tee -a "$OUT/summary"; }
finish() {
    trap - EXIT
    [ ! "$child" ] || kill "$child" 2>/dev/null
    if [ $failed = 0 ]; then say "all steps are ok"
    else say "SOME STEPS FAILED, or were not run"; fi
    tar czf "$OUT/logs.tgz" -C $WORK --exclude='./run_*' .
    awk -v json="$OUT/gpu.json" -f dev/bench/records.awk -f dev/bench/gpu_table.awk \
        "$OUT/records" >"$OUT/table" 2>&1
    printf '\n=== summary\n'
    cat "$OUT/summary" "$OUT/table"
    [ ! "$EMU" ] || echo "first.sh: TINY SIZES, EMULATED ON THE CPU: these times mean nothing"
    exit $failed
}
trap finish EXIT
trap 'failed=1; exit' HUP INT TERM

try() { # try NAME SECONDS COMMAND..: one step, and its line of the summary
    local name=$1 most=$2 left=$((LIMIT - SECONDS)) begun=$SECONDS status result
    shift 2
    [ ! "$EMU" ] || most=$((4 * most)) # a CPU is slow, and may have other work
    [ "$most" -lt "$left" ] || most=$left
    if [ "$left" -lt 8 ]; then
        say "$name: NOT RUN, no time is left"
        failed=1
        return 1
    fi
    timeout -k 5 "$most" "$@" >"$WORK/$name.log" 2>&1 &
    child=$! # in the background: Ctrl-C need not wait for it
    wait $child
    status=$?
    child=
    case $status in
        0) result=ok ;;
        124) result="NOT FINISHED, stopped after $most s" ;;
        *) result="FAILED ($status)" ;;
    esac
    say "$name: $result, $((SECONDS - begun)) s"
    if [ $status = 0 ]; then
        grep -aE '^test_gpt2.*: [0-9]+ passed|^largest difference' "$WORK/$name.log" | show
    else
        failed=1
        { grep -a '^NOT BUILT' "$WORK/$name.log"; tail -n 6 "$WORK/$name.log"; } | show
    fi
    return $status
}
measure() { # measure NAME SECONDS COMMAND..: a step; its records are kept, also of one that failed
    try "$@"
    local status=$?
    [ ! -e "$WORK/$1.log" ] || grep -a '^who=' "$WORK/$1.log" >>"$OUT/records"
    return $status
}

# ---- What needs more than one command. `try` runs these in a bash of their own
build() { # build NAME PRECISION SOURCE: over the CUDA operators; PRECISION CPU: over the CPU's
    local output=$BIN/$1 source=$3 type="-DPRECISION_$2" twin='-DTWIN_SOURCE="megatron_gpt2.cu"'
    if [ "$2" = CPU ]; then
        [ "$1" != test_gpt2_double ] || type=-DREAL=double
        ${CC:-cc} -std=c11 -O1 -march=native -fopenmp -fno-math-errno -fno-trapping-math \
            -ffp-contract=fast -w "$type" "$source" -o "$output" -lm -lpthread
    elif [ "$EMU" ]; then
        twin="-DTWIN_SOURCE=\"$BIN/twin.cpp\""
        [ "$source" != megatron_gpt2.cu ] || source=$BIN/twin.cpp
        ${CXX:-g++} -std=gnu++17 -O1 -w -I. "$twin" "$type" -x c++ "$source" \
            -x none $BIN/cudaemu.o -o "$output" -lm -lpthread
    else
        $NVCC $NVCCFLAGS -I. "$twin" "$type" -x cu "$source" -o "$output" $LIBRARIES
    fi && return
    echo "NOT BUILT: $1"
    return 1
}
build_all() { # side by side, on all cores
    if [ "$EMU" ]; then
        sed -f dev/cudaemu/cu2cpp.sed megatron_gpt2.cu >$BIN/twin.cpp
        ${CXX:-g++} -std=gnu++17 -O2 -w -c dev/cudaemu/cudaemu.cpp -o $BIN/cudaemu.o || return 1
    fi
    printf '%s\n' "test_twin_bf16 BF16 test_gpt2.c" "gpu_bf16 BF16 dev/bench/gpu.cu" \
        "megatron_gpt2_bf16 BF16 megatron_gpt2.cu" "test_twin_fp32 FP32 test_gpt2.c" \
        "test_gpt2 CPU test_gpt2.c" "test_gpt2_double CPU test_gpt2.c" \
        "test_twin_fp16 FP16 test_gpt2.c" "gpu_tf32 TF32 dev/bench/gpu.cu" \
        "gpu_fp32 FP32 dev/bench/gpu.cu" |
        xargs -L 1 -P "$(nproc)" bash -c 'build "$@"' build
}
compare() { # compare PROGRAM TEST: the twin against the CPU; a skipped test compares nothing
    cd $BIN || return 1
    "./$1" "$2" | awk '{ print } /, 0 failed, 0 skipped$/ { ok = 1 } END { exit !ok }'
}
train() { # train NAME OPTION..: a short run on text
    local name=run_$1
    shift
    $BIN/megatron_gpt2_bf16 train --data doc $SHAPE --lr 1e-3 --warmup 2 "$@" \
        --save "$WORK/$name" --log "$WORK/$name.jsonl"
}
same_bits() { # same_bits A B: all weights and moments of two runs
    cmp "$WORK/run_$1/model.safetensors" "$WORK/run_$2/model.safetensors" &&
        cmp "$WORK/run_$1/trainer.safetensors" "$WORK/run_$2/trainer.safetensors"
}
losses() { sed 's/.*"loss": \([^,]*\),.*/\1/' "$WORK/run_$1.jsonl"; }
same_losses() { # same_losses A B BOUND: relative, in every step
    paste <(losses "$1") <(losses "$2") | awk -v bound="$3" '
        {
            difference = ($1 - $2) / $1
            if (difference < 0) difference = -difference
            if (!(difference <= most)) most = difference
            if (NF != 2) most = "nan"
        }
        END {
            print "largest difference of a loss", most, "of", bound
            exit !(NR > 0 && most + 0 == most && most <= bound)
        }'
}
refusals() { # cuBLASLt may refuse an epilogue; the program then goes a slower way, without a word
    CUBLASLT_LOG_MASK=1 CUBLASLT_LOG_FILE=$WORK/refused $BIN/gpu_bf16 step "$1" 2 0 1 || return 1
    [ -s $WORK/refused ] || return 0
    sort $WORK/refused | uniq -c | sort -rn | head -n 5
    return 1
}
export -f build build_all compare train same_bits losses same_losses refusals

# ---- 0. Where are we?
{
    date
    uname -a
    nproc
    nvidia-smi
    $NVCC --version
    $PYTHON -c 'import torch; print(torch.__version__, torch.version.cuda)'
    command -v cc g++ compute-sanitizer ncu
} >$WORK/machine.log 2>&1
say "$(nvidia-smi -L 2>/dev/null || echo no GPU)"
say "$($NVCC --version 2>/dev/null | grep release || echo no nvcc)"

# cuBLAS is the toolkit's, or the one that PyTorch brought.
export LIBRARIES="-lcublas -lcublasLt"
if [ ! "$EMU" ]; then
    echo 'int main(void) { return 0; }' >$WORK/try.cu
    if ! $NVCC $WORK/try.cu -o $WORK/try $LIBRARIES >/dev/null 2>&1; then
        folder=$($PYTHON -c 'import nvidia.cu13 as n; print(list(n.__path__)[0])' 2>/dev/null ||
            $PYTHON -c 'import nvidia.cublas as n; print(list(n.__path__)[0])' 2>/dev/null)
        LIBRARIES="-I$folder/include -L$folder/lib -l:libcublas.so.13 -l:libcublasLt.so.13"
        LIBRARIES="$LIBRARIES -Xlinker -rpath -Xlinker $folder/lib"
        say "cuBLAS is PyTorch's: ${folder:-not found}"
    fi
fi

# ---- 1. Is it right? Operators and whole models against the CPU's; the same bits twice
try build 170 bash -c build_all
try fp32_operators 40 bash -c 'compare test_gpt2 twin_operators'
try bf16_fp16_operators 60 bash -c 'compare test_gpt2_double twin_operators'
try fp32_models 40 bash -c 'compare test_gpt2 twin_models'
try bf16_fp16_models 60 bash -c 'compare test_gpt2_double twin_models'
try train_twice_same_bits 40 bash -c 'train a && train b && same_bits a b'
try train_tp2_dp2_same_losses 40 bash -c 'train c --tp 2 --dp 2 && same_losses a c 1e-2'

# ---- 2. How fast is it? Everything of one precision first
cp -f $BIN/gpu_* build/bench/ 2>/dev/null # gpu_peer.py runs it from there
torch=
$PYTHON -c 'import sys, torch; sys.exit(not (sys.argv[1] or torch.cuda.is_available()))' \
    "$EMU" 2>/dev/null && torch=1
[ "$torch" ] || say "PyTorch is not measured: $PYTHON has no torch that sees a GPU"
measure ceilings_bf16 30 $BIN/gpu_bf16 ceilings $model
measure operators_bf16 45 $BIN/gpu_bf16 operators $model $batch
measure step_bf16 45 $BIN/gpu_bf16 step $model $batch 0 1 # alone first: torch.compile takes long
if [ "$torch" ]; then
    measure torch_operators_bf16 60 "$PYTHON" dev/bench/gpu_peer.py operators bf16 $model $batch
    measure step_bf16_in_turns 130 "$PYTHON" dev/bench/gpu_peer.py step bf16 $model $batch 0 1
fi
measure step_bf16_tp2 30 $BIN/gpu_bf16 step $model $batch 0 2
measure step_bf16_dropout 30 $BIN/gpu_bf16 step $model $batch 0.1 1
try cublaslt_refuses_nothing 30 bash -c "refusals $model"

# ---- 3. Counters of the slowest kernels, where the machine has ncu
if [ ! "$EMU" ] && command -v ncu >/dev/null; then
    try ncu 60 ncu --clock-control none -c 14 -k 'regex:flash|layernorm|column_sums|logits|delta' \
        --section SpeedOfLight --section Occupancy --section WarpStateStats \
        --section MemoryWorkloadAnalysis $BIN/gpu_bf16 step $model 4 0 1
fi

# ---- 4. The sanitizer, and the other precisions, in what time is left
if [ ! "$EMU" ] && command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        try $tool 45 compute-sanitizer --tool $tool --report-api-errors no --error-exitcode 9 \
            $BIN/test_twin_bf16 operators
    done
fi
for precision in tf32 fp32; do
    measure ceilings_$precision 20 $BIN/gpu_$precision ceilings $model
    measure step_$precision 40 $BIN/gpu_$precision step $model $((batch / 2)) 0 1
done
