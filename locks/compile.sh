#!/usr/bin/env bash
# Resolve the two locks from pyproject.toml.  torch is left out of them: its file differs between the CPU and the
# CUDA index, so the Makefile pins it by version; its own dependencies are in the lock.
set -euo pipefail
cd "$(dirname "$0")/.."
export UV_CUSTOM_COMPILE_COMMAND="make locks"
resolve() {
  uv pip compile --quiet --upgrade --generate-hashes --python-version 3.11 --no-annotate --no-emit-package torch \
    --no-emit-index-url --no-emit-find-links ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
    --constraint <(echo torch==2.13.0) "$@" pyproject.toml
}
resolve -o locks/cpu.txt
resolve --extra dev --extra parity --constraint locks/cpu.txt -o locks/dev.txt
