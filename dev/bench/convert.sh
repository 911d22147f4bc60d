#!/bin/sh
# How long a conversion of GPT-2 355M takes, and how much memory, beside a plain copy of the bytes and beside PyTorch.
#
#     make bench BENCH=convert        or   sh dev/bench/convert.sh [--json]
#
# ROUNDS=7, PYTHON=python3, and SCRATCH, a folder that is made and deleted: about 5 GB on the file system to measure.
# In each round every row runs once, so that what else the machine does meets all of them alike. Input and output stay
# in the page cache: nobody waits for the disk, neither cp nor convert.
set -e
cd "$(dirname "$0")/../.."
ROUNDS=${ROUNDS:-7} PYTHON=${PYTHON:-python3} S=${SCRATCH:-bench_scratch}
LC_ALL=C
export LC_ALL
note() { echo "$*" >&2; }
die() { note "bench: $*"; exit 1; }
json=0
[ "$1" != --json ] || json=1
[ -x ./convert ] || { note "bench: ./convert is not built: there is no zlib"; exit 0; }
[ -r /proc/self/status ] || die "it reads memory from /proc, so it needs Linux"
[ ! -e "$S" ] || die "$S exists already: delete it, or give SCRATCH=FOLDER"
mkdir "$S"
[ "$(df -Pk "$S" | awk 'NR == 2 {print $4}')" -gt 5500000 ] || { rmdir "$S"; die "$S: 5.5 GB are not free"; }
trap 'rm -rf "$S"' EXIT
trap 'exit 1' HUP INT TERM

# ---- The models: random bits, but no NaN and no infinity, whose upper byte would be 7C or more -----------------------

LAYERS=24 HIDDEN=1024 HEADS=16 TOKENS=50257
LARGEST=$((TOKENS * HIDDEN * 2)) # bytes of the word embedding
header() # safetensors' JSON; the last line is the size of the tensors
{
    awk -v L=$LAYERS -v C=$HIDDEN -v V=$TOKENS '
    function add(name, rows, cols,  n) {
        n = 2 * rows * (cols ? cols : 1)
        printf "%s\"%s\":{\"dtype\":\"F16\",\"shape\":[%d%s],\"data_offsets\":[%d,%d]}", at ? "," : "{", name, rows,
            cols ? "," cols : "", at, at + n
        at += n
    }
    function both(name, rows, cols) { add(name ".weight", rows, cols); add(name ".bias", cols ? cols : rows) }
    BEGIN {
        add("wte.weight", V, C); add("wpe.weight", 1024, C)
        for (i = 0; i < L; i++) {
            h = "h." i "."
            both(h "ln_1", C); both(h "attn.c_attn", C, 3 * C); both(h "attn.c_proj", C, C)
            both(h "ln_2", C); both(h "mlp.c_fc", C, 4 * C); both(h "mlp.c_proj", 4 * C, C)
        }
        both("ln_f", C); printf "}\n%d\n", at
    }'
}
note "making the models in $S .."
mkdir "$S/hf"
cat >"$S/hf/config.json" <<END
{"model_type": "gpt2", "n_layer": $LAYERS, "n_embd": $HIDDEN, "n_head": $HEADS, "n_positions": 1024,
 "vocab_size": $TOKENS}
END
header >"$S/header"
json_size=$(head -n 1 "$S/header" | tr -d '\n' | wc -c)
{
    for shift in 0 8 16 24 32 40 48 56; do printf "\\$(printf %03o $((json_size >> shift & 255)))"; done
    head -n 1 "$S/header" | tr -d '\n'
    tr -d '\174-\377' </dev/urandom | head -c "$(tail -n 1 "$S/header")"
} >"$S/hf/model.safetensors"
./convert "$S/hf" "$S/megatron" >"$S/log"
pt=$S/megatron/release/mp_rank_00/model_optim_rng.pt

ROWS="cp cat zip megatron megatron22"
if "$PYTHON" -c '' 2>/dev/null; then
    "$PYTHON" dev/bench/make_archives.py "$pt" "$S" && ROWS="cp cat legacy zip ngc deflated megatron megatron22"
else note "skipped: legacy and NVIDIA's layout need Python ($PYTHON) to be made"; fi
if "$PYTHON" -c 'import torch' 2>/dev/null; then ROWS="$ROWS torch"
else note "skipped: PyTorch's row needs torch in $PYTHON"; fi

# ---- The rows --------------------------------------------------------------------------------------------------------

title()
{
    case $1 in
    cp) echo "cp" ;;
    cat) echo "cat" ;;
    legacy) echo ".pt, legacy -> Hugging Face" ;;
    zip) echo ".pt, zip -> Hugging Face" ;;
    ngc) echo ".zip of a legacy .pt, stored -> Hugging Face" ;;
    deflated) echo ".zip of a legacy .pt, deflated -> Hugging Face" ;;
    megatron) echo "Hugging Face -> Megatron" ;;
    megatron22) echo "Hugging Face -> Megatron, 2 x 2 ranks" ;;
    torch) echo "PyTorch: load .pt, permute, save" ;;
    work) echo "  the same without start and imports" ;;
    esac
}
run() # in the place of this shell
{
    exec >"$S/log" 2>&1
    case $1 in
    cp) exec cp --reflink=never "$S/hf/model.safetensors" "$S/out" ;;
    cat) exec cat "$S/hf/model.safetensors" >"$S/out" ;;
    legacy) exec ./convert "$S/legacy.pt" "$S/out" ;;
    zip) exec ./convert "$pt" "$S/out" ;;
    ngc) exec ./convert "$S/stored.zip" "$S/out" ;;
    deflated) exec ./convert "$S/deflated.zip" "$S/out" ;;
    megatron) exec ./convert "$S/hf" "$S/out" ;;
    megatron22) exec ./convert "$S/hf" "$S/out" --tp 2 --pp 2 ;;
    torch) exec "$PYTHON" dev/bench/convert_torch.py "$pt" "$S/out" $LAYERS $HEADS ;;
    esac
}
failed() { cat "$S/log" >&2; die "the row $1 failed"; }

round=0
while [ $round -le "$ROUNDS" ]; do # the first one only warms up
    [ $round -eq 0 ] || note "round $round of $ROUNDS"
    for row in $ROWS; do
        rm -rf "$S/out"
        start=$(date +%s%N)
        (run "$row") || failed "$row"
        end=$(date +%s%N)
        [ $round -eq 0 ] || echo $((end - start)) >>"$S/times.$row"
        [ $round -eq 0 ] || [ "$row" != torch ] || cat "$S/log" >>"$S/times.work"
    done
    round=$((round + 1))
done

# Peak of the anonymous memory: what is neither the mapped input nor the page cache. A run of its own, since to look
# costs time.
peak()
{
    most=0
    rm -rf "$S/out"
    (run "$1") &
    pid=$!
    while kill -0 $pid 2>/dev/null; do
        for p in $pid $(cat "/proc/$pid/task/$pid/children" 2>/dev/null); do
            kb=$(awk '/^RssAnon/ {print $2}' "/proc/$p/status" 2>/dev/null) || :
            [ "${kb:-0}" -le "$most" ] || most=$kb
        done
    done
    wait $pid || failed "$1"
    echo $((most * 1024))
}
for row in $ROWS; do peak "$row" >"$S/peak.$row"; done

# ---- The table -------------------------------------------------------------------------------------------------------

# Middle, smallest and largest of a column of numbers.
summary() { sort -g | awk '{x[NR] = $1} END {print (x[int((NR + 1) / 2)] + x[int((NR + 2) / 2)]) / 2, x[1], x[NR]}'; }
bytes=$(wc -c <"$S/hf/model.safetensors")
machine="$(nproc) x $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1), load $(cut -d ' ' -f 1 /proc/loadavg)"
if [ $json = 1 ]; then
    printf '{"machine": "%s", "bytes": %d, "largest_tensor": %d, ' "$machine" "$bytes" $LARGEST
    printf '"rounds": %d, "rows": [' "$ROUNDS"
else
    echo "GPT-2 355M, fp16, $((bytes / 1000000)) MB; median of $ROUNDS rounds; $machine"
    echo "peak: anonymous memory; twice the largest tensor is $((2 * LARGEST / 1000000)) MB"
    echo
    echo "| | seconds | smallest .. largest | x cp | peak MB |"
    echo "|---|---|---|---|---|"
fi
comma=
for row in $ROWS work; do
    [ -e "$S/times.$row" ] || continue
    set -- $(summary <"$S/times.$row")
    ratio=$(paste "$S/times.$row" "$S/times.cp" | awk '{print $1 / $2}' | summary | cut -d ' ' -f 1)
    most=$(cat "$S/peak.$row" 2>/dev/null || cat "$S/peak.torch")
    echo "$1 $2 $3 $ratio $most" | if [ $json = 1 ]; then
        awk -v comma="$comma" -v row="$row" '{
            printf "%s{\"row\": \"%s\", \"seconds\": %.3f, ", comma, row, $1 / 1e9
            printf "\"smallest\": %.3f, \"largest\": %.3f, ", $2 / 1e9, $3 / 1e9
            printf "\"times_cp\": %.2f, \"peak_bytes\": %d}", $4, $5}'
    else
        awk -v title="$(title "$row")" '{
            printf "| %s | %.2f | %.2f .. %.2f | %.1f | %d |\n", title, $1 / 1e9, $2 / 1e9, $3 / 1e9, $4, $5 / 1e6}'
    fi
    comma=", "
done
[ $json = 0 ] || echo "]}"
