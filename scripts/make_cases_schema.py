"""Writes configs/cases.schema.json, the JSON Schema of cases files, from `mosaic.rendering.cases` (reading, shapes).

The command itself is scripts/schemas/cases.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.schemas.cases import main

if __name__ == "__main__":
    sys.exit(main())
