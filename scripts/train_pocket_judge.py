"""Train the identity judge on endless random scenes; run again to resume.

The command itself is scripts/pocket/train_judge.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.pocket.train_judge import main

if __name__ == "__main__":
    main()
