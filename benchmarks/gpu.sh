#!/bin/sh
# The GPU tests and the kernels' benchmark in one command, for a machine that is lent for minutes.
# Needs torch with CUDA, Triton and pytest; no vLLM and no models. Without hypothesis the tests are
# left out, without matplotlib the plot. PYTHON, OUT and LIMIT (seconds) may be set.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
$python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no CUDA device')"
status=0
# One that fails must not cost the other: the machine may not be had again.
if $python -c "import hypothesis" 2>/dev/null; then
    $python -m pytest -q -m gpu tests/kernels || status=$?
else
    echo "hypothesis is missing: THE GPU TESTS ARE LEFT OUT"
fi
$python benchmarks/kernels.py --seconds "${LIMIT:-420}" --out "${OUT:-docs/figures}/kernels.json" || status=$?
exit $status
