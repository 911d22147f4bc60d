#!/bin/sh
# Tests the emulator and its checker. Each feature is compared with plain C, with and without the
# checker; the checker must report every planted bug and no twin of one. Exit status 0 if all tests
# pass. CXX=clang++ sh dev/cudaemu/test.sh tries another compiler.
cd "$(dirname "$0")" || exit 2
CXX=${CXX:-g++}
export CXX
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0

try() { # name, command ..
    printf '%s: ' "$1"
    shift
    if "$@" > "$work/log" 2>&1; then tail -n 1 "$work/log"; else cat "$work/log"; status=1; fi
}

emulate() {
    (echo '#line 1 "test_cudaemu.cu"'; sed -f cu2cpp.sed test_cudaemu.cu) > "$work/test.cpp" &&
    $CXX -std=gnu++17 -O2 -Wall -Wextra -Wshadow -Werror -I. $1 \
        "$work/test.cpp" cudaemu.cpp -lpthread -o "$work/test" &&
    "$work/test"
}
try 'emulator' emulate
try 'emulator on ucontext' emulate -DCUDAEMU_UCONTEXT
checked() { sh check.sh "$work/test" test_cudaemu.cu && "$work/test"; }
try 'emulator with the checker' checked
planted() { (cd planted && sh ../check.sh "$work/planted" planted.cu && "$work/planted"); }
try 'checker' planted
exit $status
