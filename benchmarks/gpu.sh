#!/bin/sh
# The GPU tests, the kernels' benchmark and cold loads in one command, for a machine that is lent
# for minutes. Needs torch with CUDA, Triton and pytest; no vLLM and no models. Without hypothesis
# the tests are left out, without pydantic, safetensors and tokenizers those of the product around
# the kernels, without matplotlib the plot. PYTHON, OUT, TESTS and LIMIT (seconds for the tests, and
# for the benchmark) may be set.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels:benchmarks:.${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
out=${OUT:-docs/figures}
$python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'no CUDA device')"
tests=tests/kernels
product=
if $python -c "import pydantic, safetensors, tokenizers" 2>/dev/null; then
    product=yes
    tests="$tests tests/unit/test_workspace.py tests/unit/test_device_writer.py"
else
    echo "pydantic, safetensors or tokenizers is missing: THE PRODUCT'S OWN LOADS ARE LEFT OUT"
fi
status=0
# One that fails must not cost the others: the machine may not be had again.
if $python -c "import hypothesis" 2>/dev/null; then
    timeout "${TESTS:-240}" $python -m pytest -q -m gpu $tests || status=$?
else
    echo "hypothesis is missing: THE GPU TESTS ARE LEFT OUT"
fi
$python benchmarks/kernels.py --seconds "${LIMIT:-300}" --out "$out/kernels.json" || status=$?
$python benchmarks/cold_load.py --out "$out/cold_load.json" || status=$?
[ -z "$product" ] || $python benchmarks/device_loads.py --out "$out/device_loads.json" || status=$?
exit $status
