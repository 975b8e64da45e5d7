"""Every family that vLLM serves says after its own memory what it says after the text itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, IN_EVERY_RUN, SAID, UNSERVED

pytestmark = [pytest.mark.engine, pytest.mark.timeout(60 * len(FAMILIES))]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What each selected family said: one process for all of them, since most of an engine's start
    is vLLM's import."""
    chosen = [
        item.callspec.params["family"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module
    ]
    out = tmp_path_factory.mktemp("families") / "runs.jsonl"
    script = Path(__file__).with_name("run_families.py")
    done = subprocess.run([sys.executable, script, out, *chosen], capture_output=True, text=True)
    assert out.is_file(), done.stderr[-3000:]
    found = {run["family"]: run for run in map(json.loads, out.read_text().splitlines())}
    return {name: found.get(name, {"error": done.stderr[-3000:]}) for name in chosen}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.nightly)
        for name in FAMILIES
        if name not in UNSERVED
    ],
)
def test_greedy_after_its_own_memory_is_greedy_after_the_text(
    runs: dict[str, dict[str, Any]], family: str
) -> None:
    run = runs[family]
    assert "error" not in run, run["error"]
    assert run["native"]["cached"] == 0
    assert run["memory"]["cached"] == run["tokens"]
    assert run["memory"]["ids"] == run["native"]["ids"]
    assert len(run["native"]["ids"]) == SAID
    assert len(set(run["native"]["ids"])) >= 4, "too dull a model to tell anything"
