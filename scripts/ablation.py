"""The paper's claims in miniature: train and measure all arms of the ablation in the pocket world, then draw its tables and figures.

The command itself is scripts/ablation/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.ablation.command import main

if __name__ == "__main__":
    sys.exit(main())
