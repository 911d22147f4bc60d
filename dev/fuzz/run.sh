#!/bin/sh
# Builds the fuzz targets, and runs each for FUZZ_SECONDS from corpus/ on. Fails on any finding; README.md tells more.
cd "$(dirname "$0")/../.." || exit 1
clang=${CLANG:-clang} scratch=fuzz_scratch failed=0
mkdir -p $scratch

if ! echo 'int LLVMFuzzerTestOneInput(const char *p, unsigned long n) { return p && n > 1 ? 0 : 0; }' |
    "$clang" -fsanitize=fuzzer,address,undefined -x c - -o $scratch/try 2>$scratch/try.log; then
    tail -n 1 $scratch/try.log
    echo "cannot fuzz: clang and the runtime of its fuzzer are needed (Debian: clang, libclang-rt-14-dev, zlib1g-dev)"
    exit 1
fi
rm -f $scratch/try*
"$clang" -std=gnu11 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wno-unused-function ${EXTRA:-} \
    -fsanitize=fuzzer,address,undefined,float-cast-overflow -fno-sanitize-recover=all \
    dev/fuzz/fuzz.c -o $scratch/fuzz -lz -lm || exit 1

memory=/tmp # inputs are files: they are written and read some thousand times a second
[ -w /dev/shm ] && memory=/dev/shm
TMPDIR=$(mktemp -d $memory/fuzz.XXXXXX) || exit 1
trap 'rm -rf "$TMPDIR"' EXIT
trap 'exit 1' INT TERM
export TMPDIR ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=32

for target in ${FUZZ_TARGETS:-pickle zip safetensors json config tokenizer dataset}; do
    log=$scratch/$target.log
    mkdir -p $scratch/$target
    if FUZZ_TARGET=$target $scratch/fuzz -max_total_time="${FUZZ_SECONDS:-20}" -timeout=10 -max_len=20000 \
        -rss_limit_mb=1000 -print_final_stats=1 -artifact_prefix=$scratch/finding-$target- \
        $scratch/$target dev/fuzz/corpus/$target >$log 2>&1; then
        echo "$target: $(sed -n 's/^stat::number_of_executed_units: *//p' $log) runs," \
            "$(sed -n 's/^stat::average_exec_per_sec: *//p' $log) a second," \
            "$(sed -n 's/.*DONE *\(cov: [0-9]*\).*/\1/p' $log)"
    else
        failed=1
        tail -n 40 $log
        echo "$target: a finding, see above and $log"
    fi
done
exit $failed
