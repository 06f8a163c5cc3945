"""Measure the shipped adapters of the ablation again, on this machine, against their rows: `python scripts/ablation_check.py`.

The command itself is scripts/ablation/check.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.ablation.check import main

if __name__ == "__main__":
    sys.exit(main())
