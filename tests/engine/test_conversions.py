"""The table of conversions in its short form: vLLM says in all five arms what transformers says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from awareness_demo.anchors import held_out_dir, install

from awareness_vllm.files import anchors_dir

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "conversions.py"
SMALL = ("--short", "--rank", "64", "--tokens", "5000", "--calibration", "0", "--limit", "4")
CONDITIONS = ("memory", "tokens_only", "wrong_memory", "none")


@pytest.fixture(scope="module")
def conditions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """The arms of one conversion by way of measuring; models and map are made for it."""
    install()
    home = tmp_path_factory.mktemp("home")
    for folder in (anchors_dir(), held_out_dir()):
        (home / folder.name).symlink_to(folder.resolve())
    return {through: measured(through, home) for through in ("transformers", "vllm")}


def measured(through: str, home: Path) -> dict[str, Any]:
    out = home / f"{through}.json"
    done = subprocess.run(
        [
            sys.executable,
            SCRIPT,
            "--through",
            through,
            *SMALL,
            "--only",
            "to-learned",
            "--out",
            out,
        ],
        env=os.environ | {"AWARENESS_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert out.is_file(), done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(out.read_text())["rows"]["to-learned"]["conditions"]


@pytest.mark.parametrize("arm", CONDITIONS)
def test_vllm_loses_what_transformers_loses(
    conditions: dict[str, dict[str, dict[str, float]]], arm: str
) -> None:
    """Within what bfloat16 rounds: how far apart the arms are, so short a training leaves open."""
    served, expected = conditions["vllm"][arm], conditions["transformers"][arm]
    assert served["kl"] == pytest.approx(expected["kl"], rel=0.1, abs=1e-3)
    assert served["nll"] == pytest.approx(expected["nll"], abs=0.01)
