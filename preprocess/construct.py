"""Training data from nothing: accelerate launch preprocess/construct.py CONFIG --output DIR

The command itself is preprocess/construct/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preprocess.construct.command import main

if __name__ == "__main__":
    sys.exit(main())
