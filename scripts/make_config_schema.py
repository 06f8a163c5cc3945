"""Writes configs/schema.json, the JSON Schema of config files, from the models of `mosaic.config.sections`.

The command itself is scripts/schemas/config.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.schemas.config import main

if __name__ == "__main__":
    sys.exit(main())
