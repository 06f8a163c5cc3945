"""A page for trying things out: `python scripts/app.py`, then open the address that it prints. Needs `pip install -r requirements-app.txt`.

The command itself is scripts/app/command.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.app.command import main

if __name__ == "__main__":
    sys.exit(main())
