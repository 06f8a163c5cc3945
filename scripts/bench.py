"""Benchmarks of multi-subject generation, from their authors' data to a table: `python scripts/bench.py --help`.

The command itself is scripts/bench/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench.command import main

if __name__ == "__main__":
    sys.exit(main())
