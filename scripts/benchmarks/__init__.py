"""The benchmarks; the command is scripts/benchmark.py."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
