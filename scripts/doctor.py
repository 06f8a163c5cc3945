"""Looks over a data set and says whether it can supervise: points, masks, disjointness, duplicates, sizes, captions.

The command itself is scripts/doctor/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
