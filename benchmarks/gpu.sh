#!/bin/sh
# The GPU tests and the kernels' benchmark in one command, for a machine that is lent for minutes.
# Needs torch with CUDA, Triton and pytest; no vLLM and no models. PYTHON and OUT may be set.
set -e
cd "$(dirname "$0")/.."
export PYTHONPATH=kernels
${PYTHON:-python3} -m pytest -q -m gpu tests/kernels
${PYTHON:-python3} benchmarks/kernels.py --out "${OUT:-docs/figures}/kernels.json"
