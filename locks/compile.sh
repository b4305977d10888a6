#!/usr/bin/env bash
# Resolve the locks: cpu, dev and test for a checkout, one for each image, and one to build kernels with.
#
# cpu.txt and dev.txt leave torch out: its file differs between the CPU and the CUDA index, so the Makefile pins
# it by version; its own dependencies are in the lock. The images' locks hold torch too, with every CUDA library
# that it brings: on Linux the plain package of that release is the CUDA build (docs/docker.md).
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="make locks"

resolve() {
  uv pip compile --quiet --upgrade --generate-hashes --python-version 3.11 --no-annotate \
    --no-emit-index-url --no-emit-find-links "$@"
}

checkout() {
  resolve --no-emit-package torch ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
    --constraint <(echo torch==2.13.0) "$@" pyproject.toml
}

pins() { sed -n 's/ *\\$//; s/^\([a-z0-9._-]*==.*\)/\1/p' "$1"; }

for_image() { resolve --python-platform x86_64-manylinux_2_28 --only-binary :all: "$@"; }

# image TAG TORCH: what the tests run with, except where that torch asks for another version. setuptools is not
# among our dependencies, but Triton uses it, and our own package is built with it, offline. cuDNN's frontend is
# held at the release whose attention was proven on a card (an H200).
image() {
  for_image --constraint <(pins locks/cpu.txt | grep -v '^sympy==') -o "locks/$1.txt" \
    --constraint <(echo nvidia-cudnn-frontend==1.18.0) --extra kernels pyproject.toml <(printf '%s\n' "torch==$2" setuptools)
}

checkout -o locks/cpu.txt
checkout --extra dev --extra parity --constraint locks/cpu.txt -o locks/dev.txt
resolve --constraint <(pins locks/dev.txt) -o locks/test.txt <(printf '%s\n' pytest pytest-xdist hypothesis)
image cu124 2.6.0
image cu128 2.8.0
# SageAttention's own build section caps these; the kernels are built without isolation, so the caps are ours.
for_image -o locks/kernels.txt <(printf '%s\n' 'setuptools<75' 'wheel<0.44' 'packaging<24' ninja)
