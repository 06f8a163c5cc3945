"""Benchmarks.

The command itself is scripts/benchmarks/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.command import keep_memory, main

if __name__ == "__main__":
    keep_memory()
    sys.exit(main())
