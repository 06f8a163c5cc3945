"""Measure the shipped pocket weights on held-out identities: `python scripts/evaluate.py`.

The command itself is scripts/pocket/evaluate.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
