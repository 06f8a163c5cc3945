"""LoRA files: look into one, lower its rank, and take it from the key styles of other programs.

The command itself is scripts/loras/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.loras.command import main

if __name__ == "__main__":
    sys.exit(main())
