#!/bin/sh
# Builds the CPU kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer, and runs each driver of
# sanitize/ with them, once for each instruction set that this CPU has. The drivers use buffers of exactly their size.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c++20 -O1 -g -Wall -Wextra -ffp-contract=off -fno-omit-frame-pointer -I$here
       -fsanitize=address,undefined -fno-sanitize-recover=all"
for source in "$here"/*.cpp; do
    case $source in *_binding.cpp) continue ;; esac
    ${CXX:-c++} $flags -c "$source" -o "$build/$(basename "$source" .cpp).o"
done
for driver in "$here"/sanitize/*.cpp; do
    ${CXX:-c++} $flags "$driver" "$build"/*.o -o "$build/driver"
    for isa in scalar avx2 avx512; do
        FP4_CPU_ISA=$isa "$build/driver"
    done
done
