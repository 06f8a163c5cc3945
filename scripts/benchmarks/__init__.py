"""The benchmarks; the command is scripts/benchmark.py."""
