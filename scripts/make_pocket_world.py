"""Write scenes of the pocket world as a multi-reference dataset (preprocess/FORMAT.md).

The command itself is scripts/pocket/dataset.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.dataset import main

if __name__ == "__main__":
    main()
