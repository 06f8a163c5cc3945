"""Distils text guidance into the pocket FLUX, as FLUX.1-dev has it: one pass with an embedded guidance scale stands for two.

The command itself is scripts/pocket/distill_base.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.distill_base import main

if __name__ == "__main__":
    main()
