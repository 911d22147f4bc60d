#!/bin/sh
# On a machine with an NVIDIA GPU: checks megatron_gpt2.cu, then measures it beside PyTorch; README.md tells what.
#
#     dev/bench/gpu.sh [check] [ops] [train] [--json]      no word: all three, in about eight minutes
#
# Tables, or with --json all records, go to stdout; the records are in build/bench/gpu.json, too. Variables: PYTHON, one
# that has torch (python3); TEXT to train on; SECONDS_LEFT (480); NVCC, NVCCFLAGS. BENCH_TINY=1 runs all of this in tiny
# sizes where there is no GPU, kernels emulated: its times mean nothing. Exit status 1: something failed, or no GPU.
set -u
cd "$(dirname "$0")/../.." || exit 1
bench=build/bench tiny=${BENCH_TINY:-} PYTHON=${PYTHON:-python3} failed=0 started=$(date +%s)
NVCC=${NVCC:-$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)}
TEXT=${TEXT:-$(ls ../shared/data/tinyshakespeare.txt 2>/dev/null || echo doc)}
cuda=gpu model=355M small=124M B=16 half=8 tps="2 4 8" shape="--layers 4 --hidden 256 --heads 4 --seq 256 --steps 30"
[ "$tiny" ] && cuda=emu model=tiny small=tiny B=2 half=1 tps=2 &&
    shape="--layers 2 --hidden 128 --heads 2 --seq 64 --steps 8"

stop() { echo "gpu.sh: $*" >&2; exit 1; }
seconds() { echo $(($(date +%s) - started)); }
left() { echo $((${SECONDS_LEFT:-480} - $(seconds))); }
note() { # note NAME TEXT: a record, and a line
    echo "who=gpu.sh kind=note name=$1 text=$(echo "$2" | tr -s ' \t\n' _ | cut -c 1-200)" >>$bench/records
    echo "   $1: $2" >&2
}
check() { # check NAME COMMAND..: runs it, and counts
    title=$1 result=ok begun=$(seconds)
    shift
    "$@" >"$bench/log/$title" 2>&1
    case $? in
        0) ;;
        124) result=not_finished ;; # its timeout's: neither good nor bad
        *) result=FAILED failed=1; tail -n 20 "$bench/log/$title" >&2 ;;
    esac
    echo "who=gpu.sh kind=check name=$title result=$result" >>$bench/records
    echo "== $title: $result, $(($(seconds) - begun)) s" >&2
}
build() { # build OUTPUT PRECISION SOURCE
    set -- "$1" "-DPRECISION_$(echo "$2" | tr a-z A-Z)" "$3"
    if [ "$tiny" ]; then
        sed -f dev/cudaemu/cu2cpp.sed megatron_gpt2.cu >"$1.cpp"
        [ "$3" = megatron_gpt2.cu ] && set -- "$1" "$2" "$1.cpp"
        ${CXX:-g++} -std=gnu++17 -O1 -w -I. -DTWIN_SOURCE="\"$1.cpp\"" "$2" -x c++ "$3" dev/cudaemu/cudaemu.cpp \
            -o "$1" -lm -lpthread
    else "$NVCC" ${NVCCFLAGS:--O3 -std=c++17 -arch=native -Xcompiler -fopenmp} "$2" "$3" -o "$1" -lcublas -lcublasLt; fi
}
build_all() { # side by side
    for p in fp32 tf32 bf16; do build $bench/gpu_$p $p dev/bench/gpu.cu & done
    for p in fp32 bf16; do build $bench/megatron_gpt2_$p $p megatron_gpt2.cu & done
    wait
    ls $bench/gpu_fp32 $bench/gpu_tf32 $bench/gpu_bf16 $bench/megatron_gpt2_fp32 $bench/megatron_gpt2_bf16
}

# ---- Checks
train() { # train NAME PROGRAM OPTION..: a short run on text
    name=$1 program=$2
    shift 2
    "$program" train --data "$TEXT" $shape --lr 1e-3 --warmup 2 "$@" --save "$bench/$name" --log "$bench/$name.jsonl"
}
losses() { sed 's/.*"loss": \([^,]*\),.*/\1/' "$bench/$1.jsonl"; }
same_losses() { # same_losses A B BOUND: relative, in every step
    losses "$1" >$bench/losses && losses "$2" | paste $bench/losses - | awk -v bound="$3" '
        { d = ($1 - $2) / $1; d = d < 0 ? -d : d; if (!(d <= most)) most = d; if (NF != 2) most = "nan" }
        END { print "largest difference", most, "of", bound; exit !(NR > 0 && most + 0 == most && most <= bound) }'
}
same_runs() { # same_runs A B: loss and norm of every step, all weights and moments, bit by bit
    for name in "$1" "$2"; do sed 's/"tokens_per_second.*//' "$bench/$name.jsonl" >"$bench/$name/log"; done
    for file in log model.safetensors trainer.safetensors; do cmp "$bench/$1/$file" "$bench/$2/$file" || return 1; done
}
sanitize() { # sanitize PRECISION: the four tools side by side, since all are slow
    tools="memcheck racecheck initcheck synccheck"
    for tool in $tools; do
        (timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 1 "./test_twin_$1" operators >"$bench/$tool" 2>&1
        echo $? >>"$bench/$tool") &
    done
    wait
    for tool in $tools; do check "${tool}_$1" sh -c 'grep -a "^===" "$0"; exit "$(tail -n 1 "$0")"' "$bench/$tool"; done
}
checks() {
    rm -f test_twin_* # they may be of the other kind: emulated, or not
    check make_test make -j "$(nproc)" test CUDA=$cuda
    if [ "$tiny" ]; then note compute-sanitizer "not run: no GPU"
    elif ! command -v compute-sanitizer >/dev/null; then note compute-sanitizer "not run: not installed"
    else for p in fp32 bf16; do sanitize $p; done; fi
    check cpu_program make megatron_gpt2
    check cpu_train train cpu ./megatron_gpt2
    for p in fp32 bf16; do
        bound=1e-5 program=$bench/megatron_gpt2_$p
        [ $p = bf16 ] && bound=1e-2
        check ${p}_train train $p $program
        check ${p}_train_again train ${p}_again $program
        check ${p}_train_tp=2 train ${p}_tp2 $program --tp 2
        check ${p}_two_runs_are_equal same_runs $p ${p}_again
        check ${p}_follows_the_CPU same_losses cpu $p $bound
        check ${p}_tp=2_follows_tp=1 same_losses $p ${p}_tp2 $bound
    done
}

# ---- Measurements
record() { # record NAME COMMAND..: its records, all or, if it fails, only its notes
    title=$1
    shift
    "$@" >$bench/out 2>"$bench/log/$title" && cat $bench/out >>$bench/records && return
    grep -a kind=note $bench/out >>$bench/records
    note "$title" "FAILED: $(tail -n 1 "$bench/log/$title")"
    return 1
}
operators() {
    for p in bf16 tf32 fp32; do
        record operators_$p timeout 120 $bench/gpu_$p operators $model $B || failed=1
        [ "$peer" ] && record torch_operators_$p timeout 120 "$PYTHON" dev/bench/gpu_peer.py operators $p $model $B
    done
}
step() { # step PRECISION CONFIG B DROPOUT TP: beside PyTorch, if TP is 1 and there is time to compile its model
    what=step_$1_$2_$3_$4_tp=$5
    [ "$(left)" -lt 15 ] && { note "$what" "not run: no time left"; return; }
    if [ "$peer" ] && [ "$5" = 1 ] && [ "$(left)" -lt 75 ]; then note "$what" "PyTorch not run: no time to compile"
    elif [ "$peer" ] && [ "$5" = 1 ]; then
        record "$what" timeout "$(left)" "$PYTHON" dev/bench/gpu_peer.py step "$@" && return
    fi
    record "$what" timeout 60 $bench/gpu_$1 step "$2" "$3" "$4" "$5" || failed=1
}
steps() { # the most telling first: time may run out
    step bf16 $model $B 0 1
    for tp in $tps; do step bf16 $model $B 0 "$tp"; done
    step bf16 $small $((2 * B)) 0 1
    step tf32 $model $half 0 1
    step fp32 $model $half 0 1
    step bf16 $model $B 0.1 1
    step tf32 $small $B 0 1
    step fp32 $small $B 0 1
}

do_check='' do_ops='' do_train='' json=''
for word; do case $word in
    check) do_check=1 ;; ops) do_ops=1 ;; train) do_train=1 ;; --json) json=1 ;;
    *) stop "'$word' is not check, ops, train or --json" ;;
esac; done
[ "$do_check$do_ops$do_train" ] || do_check=1 do_ops=1 do_train=1
if [ ! "$tiny" ]; then
    [ "$NVCC" ] || stop "nvcc was not found: install NVIDIA's CUDA toolkit, or say where it is by NVCC=.."
    nvidia-smi -L >/dev/null 2>&1 || stop "nvidia-smi -L finds no NVIDIA GPU; try BENCH_TINY=1"
fi
rm -rf $bench && mkdir -p $bench/log && : >$bench/records || exit 1
check build build_all
[ $failed = 0 ] || stop "it does not build"
[ "$do_check" ] && checks
if [ "$do_ops$do_train" ]; then
    peer=1
    "$PYTHON" -c 'import sys, torch; sys.exit(not (sys.argv[1] or torch.cuda.is_available()))' "$tiny" 2>/dev/null ||
        { peer=; note PyTorch "not run: $PYTHON has no torch that sees a GPU"; }
    for p in bf16 tf32 fp32; do record ceilings_$p timeout 60 $bench/gpu_$p ceilings $model || failed=1; done
    [ "$do_ops" ] && operators
    [ "$do_train" ] && steps
fi
awk -v json=$bench/gpu.json -f dev/bench/records.awk -f dev/bench/gpu_table.awk $bench/records >$bench/table
if [ "$json" ]; then cat $bench/gpu.json; else cat $bench/table; fi
echo "gpu.sh: $(seconds) s; records in $bench/gpu.json, output of all commands in $bench/log" >&2
[ "$tiny" ] && echo "gpu.sh: TINY SIZES, EMULATED ON THE CPU: these times mean nothing" >&2
exit $failed
