"""The parts of `benchmarks/kernels.py`: cases, clocks, rows and verdicts."""
