"""Kills at random moments: what is listed is whole, the next command succeeds, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"
KILLED_IN_A_BAR = """
import os, signal, sys, time
from pathlib import Path
from tqdm import tqdm
import forks

log, begun = Path(sys.argv[1]), Path(sys.argv[2])
forks.LONGEST_S = 5
tqdm.get_lock()  # made before the children are

def hold():
    with tqdm.get_lock():
        begun.touch()
        time.sleep(60)

child = forks.forked(hold, log)
while not begun.exists():
    time.sleep(0.01)
os.kill(child, signal.SIGKILL)
forks.status_of(child)
raise SystemExit(forks.status_of(forks.forked(lambda: tqdm(range(3), file=sys.stderr), log)))
"""


def test_ten_kills_break_nothing() -> None:
    # A process of its own: it forks, which this one with its threads must not.
    argv = [sys.executable, str(SCRIPT), "--kills", "10"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert {kind["kills"] for kind in report["kinds"].values()} == {2}
    assert not report["problems"], report["kinds"]
    assert report["in_a_write"]


def test_a_child_that_was_killed_in_a_progress_bar_stops_no_other(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", KILLED_IN_A_BAR, str(tmp_path / "log"), str(tmp_path / "begun")]
    result = subprocess.run(argv, cwd=SCRIPT.parent, capture_output=True, text=True)
    assert result.returncode == 0, (tmp_path / "log").read_text() + result.stderr
