"""Draw the tables and figures of an ablation from its results file: `python scripts/ablation_figures.py outputs/ablation/results.json`.

The command itself is scripts/ablation/figures.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.ablation.figures import main

if __name__ == "__main__":
    sys.exit(main())
