#!/bin/sh
# Builds a CUDA program for the CPU, with the checker (cudacheck.cpp) in it. Run the program to
# check its kernels.
#
#     sh dev/cudaemu/check.sh PROGRAM SOURCE [compiler flags]
#
# SOURCE is a .cu, or C++ made by cu2cpp.sed. CXX=g++ (the default) finds more errors than clang++:
# see README.md.
set -e
here=$(dirname "$0")
program=$1 source=$2
shift 2
CXX=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

case $source in
*.cu) (echo "#line 1 \"$source\""; sed -f "$here/cu2cpp.sed" "$source") > "$work/program.cpp" ;;
*) (echo "#include \"$PWD/$source\"") > "$work/program.cpp" ;;
esac

# By default clang does not report reads that a write to the same place follows.
case $($CXX --version) in
*clang*) whole='-mllvm -tsan-instrument-read-before-write=1' ;;
*) whole= ;;
esac

$CXX -std=gnu++17 -O1 -g -DCUDACHECK -I. -I"$here" "$@" $whole -fno-sanitize-recover=all \
    -fsanitize=thread,bounds,alignment,signed-integer-overflow,shift,integer-divide-by-zero \
    -c "$work/program.cpp" -o "$work/program.o"
objcopy --redefine-sym memcpy=__tsan_memcpy --redefine-sym memmove=__tsan_memmove \
    --redefine-sym memset=__tsan_memset "$work/program.o"
$CXX -std=gnu++17 -O2 -g -I"$here" -c "$here/cudacheck.cpp" -o "$work/cudacheck.o"
$CXX "$work/program.o" "$work/cudacheck.o" -lm -lpthread -o "$program"
