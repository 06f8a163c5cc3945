"""Trains the VAE of the pocket FLUX on pictures of the pocket world.

The command itself is scripts/pocket/train_vae.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.train_vae import main

if __name__ == "__main__":
    main()
