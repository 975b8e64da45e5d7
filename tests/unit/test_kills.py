"""Kills at random moments: what is listed is whole, the next command succeeds, nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def test_ten_kills_break_nothing() -> None:
    # A process of its own: it forks, which this one with its threads must not.
    argv = [sys.executable, str(SCRIPT), "--kills", "10"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.stdout, result.stderr
    report = json.loads(result.stdout)
    assert {kind["kills"] for kind in report["kinds"].values()} == {2}
    assert not report["problems"], report["kinds"]
    assert report["in_a_write"]
