#!/bin/sh
# How fast megatron_gpt2 is on this CPU, beside its ceilings, OpenBLAS and PyTorch; README.md tells what and how.
#
#     make bench BENCH=cpu         or, after make build/bench_cpu:   sh dev/bench/cpu.sh [--json] [--only PART]..
#     sh dev/bench/cpu.sh --against CMD     times another program's training steps beside ours
#
# PARTs: ceilings sgemm step attention generate layouts memory. ROUNDS=7; PYTHON=python3, one that has torch; SCRATCH,
# a folder that is made and deleted. BENCH_TINY=1 runs all of it in tiny sizes: its times mean nothing.
set -u
cd "$(dirname "$0")/../.." || exit 1
LC_ALL=C
export LC_ALL
cpu=build/bench_cpu tiny=${BENCH_TINY:-} PYTHON=${PYTHON:-python3} S=${SCRATCH:-bench_scratch}
only='' json='' against=''
ROUNDS=${ROUNDS:-${tiny:+1}} ROUNDS=${ROUNDS:-7} started=$(date +%s)
stop() { echo "cpu.sh: $*" >&2; exit 1; }
usage() { echo "cpu.sh: $*" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
    --json) json=1 ;;
    --only | --against)
        [ $# -gt 1 ] || usage "$1 needs a value"
        if [ "$1" = --only ]; then only="$only $2"; else against=$2; fi
        shift ;;
    *) usage "'$1' is not --json, --only PART or --against CMD" ;;
    esac
    shift
done
for part in $only; do
    case $part in
    ceilings | sgemm | step | attention | generate | layouts | memory) ;;
    *) usage "--only $part is not known; there are ceilings sgemm step attention generate layouts memory" ;;
    esac
done
for program in $cpu ./megatron_gpt2; do [ -x $program ] || stop "$program is not built: make all $cpu"; done
[ -r /proc/self/status ] || stop "it needs Linux"
[ ! -e "$S" ] || stop "$S exists already: delete it, or give SCRATCH=FOLDER"
mkdir "$S" || exit 1
trap 'rm -rf "$S"' EXIT
trap 'exit 1' HUP INT TERM
: >"$S/records"

wanted() { [ ! "$against" ] && case " ${only:-$1} " in *" $1 "*) ;; *) false ;; esac; }
record() { echo "$*" >>"$S/records"; }
note() { record "kind=note text=$(echo "$*" | tr ' ' _)"; echo "cpu.sh: $*" >&2; }
turns() { # turns COMMAND..: workers that take turns
    for command; do
        shift
        set -- "$@" "exec $command"
    done
    $cpu turns "$ROUNDS" "$@" >>"$S/records" 2>"$S/log" || note "$cpu turns $* failed"
    [ ! -s "$S/log" ] || note "$(tail -n 1 "$S/log")"
    echo "cpu.sh: $(($(date +%s) - started)) s, load $(cut -d ' ' -f 1 /proc/loadavg)" >&2
}

# ---- The machine, and what there is of peers
record "kind=info name=machine text=$(nproc)_x_$(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1 | tr ' ' _)"
record "kind=info name=load text=$(cut -d ' ' -f 1-3 /proc/loadavg | tr ' ' _)"
$cpu info >>"$S/records" || stop "$cpu does not run"
torch=
if ! [ "$against" ] && { wanted step || wanted attention; }; then
    torch=$("$PYTHON" dev/bench/cpu_peer.py version 2>/dev/null) ||
        note "PyTorch is not measured: PYTHON=$PYTHON has no torch of version 2.3 or newer"
fi
# The allocator keeps its memory: else each step maps and clears it anew.
keep="MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=99999999999 MALLOC_TOP_PAD_=67108864"
peer() { echo "env $keep $PYTHON dev/bench/cpu_peer.py $*"; }
record "kind=info name=pytorch text=${torch:-none}"

# ---- The parts; config, B, T and heads of the model
size=124M heads=12 length=1024 many=512
[ "$tiny" ] && size=tiny heads=4 length=64 many=8

# A step of 4 sequences of 64 tokens, cut into ranks: layout TP PP DP HEADS.
layout() {
    batch=$((4 / $3))
    [ "$2" = 1 ] && micro=1 || micro=$batch batch=1
    echo "$cpu step layouts $size/heads_$4/tp$1_pp$2_dp$3 $size $batch $micro 64 $4 $1 $2 $3"
}
if wanted ceilings; then turns "$cpu ceilings ceilings $many"; fi
if wanted sgemm; then
    shapes="124M+head/256 124M+head/1024 124M/4096 355M/256 355M/1024 355M/4096"
    [ "$tiny" ] && shapes="tiny+head/64 tiny/128"
    turns "$cpu sgemm ours $shapes" "$cpu sgemm openblas $shapes"
fi
step() { # step CONFIG B T HEADS
    what="step step $1/$2x$3 $1 $2"
    if [ "$torch" ]; then turns "$cpu $what 1 $3 $4 1 1 1 watch" "$(peer step $1/$2x$3 $1 $2 $3 $4)"
    else turns "$cpu $what 1 $3 $4 1 1 1 watch"; fi
}
if wanted step; then
    step $size 4 64 $heads
    [ "$tiny" ] || step 124M 1 1024 12
    [ "$tiny" ] || step tiny 12 64 4
fi
if wanted attention; then
    work="attention 4 12 64 64 1024"
    [ "$tiny" ] && work="attention 1 2 64 64 128"
    if [ "$torch" ]; then turns "$cpu $work" "$(peer "$work")"; else turns "$cpu $work"; fi
fi
if wanted generate; then
    if [ "$tiny" ]; then turns "$cpu generate tiny 16" "$cpu ceilings generate $many"
    else turns "$cpu generate 124M 64" "$cpu generate tiny 1000" "$cpu ceilings generate $many"; fi
fi
if wanted layouts; then # no more at a time than memory holds
    turns "$(layout 1 1 1 $heads)" "$(layout 2 1 1 $heads)" "$(layout 4 1 1 $heads)"
    turns "$(layout 1 1 1 $heads)" "$(layout 1 2 1 $heads)" "$(layout 1 1 2 $heads)" "$(layout 2 2 1 $heads)"
    turns "$(layout 1 1 1 16)" "$(layout 8 1 1 16)"
    [ "$tiny" ] || { size=tiny && turns "$(layout 1 1 1 4)" "$(layout 2 1 1 4)"; size=124M; }
fi

# ---- Whole programs: they train on a text of random letters
text() { [ -e "$S/text" ] || head -c 1000000 /dev/urandom | base64 >"$S/text"; }
if wanted memory; then
    text
    shape="--config $size --vocab 50257 --batch 4 --seq 64"
    $cpu peak ./megatron_gpt2 train --data "$S/text" $shape --dropout 0 --steps 3 >>"$S/records" 2>"$S/log" ||
        note "the training run failed: $(tail -n 1 "$S/log")"
    record "kind=memory name=plan value=$(./megatron_gpt2 plan $shape --json |
        sed -n 's/.*"bytes_per_rank": \([^,]*\),.*/\1/p')"
fi
elapsed() { # elapsed COMMAND: milliseconds
    begun=$(date +%s%N)
    sh -c "$1" >"$S/log" 2>&1 || stop "'$1' failed: $(tail -n 1 "$S/log")"
    echo $((($(date +%s%N) - begun) / 1000000))
}
if [ "$against" ]; then
    text
    BATCH=${BATCH:-4} SEQ=${SEQ:-64} CONFIG=${CONFIG:-$size} few=2 more=${MORE_STEPS:-8}
    export BATCH SEQ
    ours="./megatron_gpt2 train --config $CONFIG --vocab 50257 --data $S/text --dropout 0 --batch $BATCH --seq $SEQ"
    ours="$ours --micro-batch $BATCH --steps \$STEPS"
    record "kind=info name=against text=$(echo "$against" | tr ' ' _)"
    for round in $(seq 0 "$ROUNDS"); do
        for who in ours other; do
            [ $who = ours ] && command=$ours || command=$against
            short=$(STEPS=$few elapsed "$command") && long=$(STEPS=$more elapsed "$command") || exit 1
            record "round=$round part=against name=$CONFIG/${BATCH}x$SEQ who=$who ms=$(((long - short) / (more - few)))"
        done
    done
fi

awk -v json="$json" -v memory_of="$size/4x64" -f dev/bench/records.awk -f dev/bench/cpu_table.awk "$S/records"
[ ! "$tiny" ] || echo "cpu.sh: TINY SIZES: these times mean nothing" >&2
