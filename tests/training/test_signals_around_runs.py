"""Signals while a script imports and after its run has ended, and flags that only print."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from scripts.launching.processes import end_on_signals
end_on_signals({code})
print("ready", flush=True)
import time
for _ in range(300): time.sleep(0.1)  # a signal that comes just before one long sleep would wait for its end
"""


@pytest.mark.parametrize(
    ("number", "given", "code"), [(signal.SIGTERM, "", 75), (signal.SIGUSR1, "", 75), (signal.SIGINT, "", 75), (signal.SIGTERM, "2", 2)]
)
def test_a_signal_ends_a_starting_script_with_the_requeue_code_and_a_failed_one_with_its_own(
    number: signal.Signals, given: str, code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=str(ROOT), code=given)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(timeout=30) == code
        assert process.stderr.read() == f"stopped by {number.name}\n"


def test_flags_that_only_print_start_one_process(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/launch.py"), str(ROOT / "configs/pocket.json"), "--print-config"]
    done = subprocess.run(command, env={**os.environ, "NUM_PROCESSES": "2"}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"disentanglement_cap"') == 1
