"""Kill a training run again and again, resume it each time, and compare it with one that ran through.

The command itself is scripts/launching/kill_test.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching.kill_test import main

if __name__ == "__main__":
    sys.exit(main())
