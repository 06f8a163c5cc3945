"""Start scripts/train.py on what the environment names: a CPU, one GPU, all GPUs of this machine, or several machines.

The command itself is scripts/launching/launch.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching.launch import main
from scripts.launching.processes import end_on_signals

if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
