"""Trains the pocket FLUX from scratch as a text-to-image model of the pocket world: transformer and both text encoders.

The command itself is scripts/pocket/train_base.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.train_base import main

if __name__ == "__main__":
    main()
