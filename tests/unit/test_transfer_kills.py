"""Pushes and pulls of several processes, killed at random: the benchmark, with small packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.unit, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def test_nothing_is_lost_and_nothing_is_half_there(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = ["--packages", "8", "--tokens", "200", "--kills", "8", "--rounds", "1"]
    script = ROOT / "benchmarks" / "registry_transfers.py"
    command = [sys.executable, str(script), *argv, "--folder", str(tmp_path), "--out", str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kinds = json.loads(out.read_text())["kills"]
    assert [(kind["what"], kind["kills"], kind["faults"]) for kind in kinds] == [
        ("push", 4, []),
        ("pull", 4, []),
    ]
    assert all(kind["looks"] for kind in kinds)
