"""The benchmark of loads on a device: rows are written as they are made, or say why not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "device_loads.py"
    spec = importlib.util.spec_from_file_location("device_loads_script", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_a_load_is_timed_in_parts(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--shapes", "tiny", "--device", "cpu", "--tokens", "3000", "--repeats", "1", "--out"]
    script.main([*options, str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    found = row["measured"]
    assert 0 < found["write_ms"] <= found["engine_ms"] < found["ms"]
    assert 0 < found["transient_bytes"] < found["counted_bytes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_rows_say_so(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    script.main(["--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["shape"] for row in rows] == ["8B", "70B"]
    assert {row["measured"] for row in rows} == {"not measured: no CUDA device"}
