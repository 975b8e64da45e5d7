"""The kernels' benchmark: every column is there or says why not, and a GPU's bars are judged."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_benchmark import cases, device, rows, verdicts

pytestmark = [pytest.mark.unit, pytest.mark.nightly]

DEMO = "SmolLM2-135M → Gemma-3-270M"
RUN = ["--pairs", DEMO, "--tokens", "32", "--repeats", "1"]
MEASURED = {"bytes", "flop", "difference", "product_ms", "copy_ms", "of_floor"}
ON_CUDA = {"eager_ratio", "compiled_ratio"} | {
    f"device_{name}" for name in ("ms", "product_ms", "copy_ms", "of_floor")
}


def script() -> ModuleType:
    """The script, as on a machine without CUDA, whatever this one has."""
    path = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("kernels_script", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device.CUDA, device.DEVICE = False, "cpu"
    return module


kernels = script()


def run(folder: Path, *more: str) -> dict[str, Any]:
    """What the benchmark writes; on one thread, since several wait for each other on a busy CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(kernels, "plot"):
            kernels.main([*RUN, "--out", str(folder / "kernels.json"), *more])
    finally:
        torch.set_num_threads(threads)
    return json.loads((folder / "kernels.json").read_text())


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    run(folder)
    return folder / "kernels.json"


def test_every_column_is_a_number_or_says_why_not(measured: Path) -> None:
    document = json.loads(measured.read_text())
    assert document["versions"].keys() == {"python", "torch", "triton", "cuda", "driver"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["hardware"]
    assert document["pairs"][DEMO]["rank"] == 1024
    assert [row["operation"] for row in document["rows"]] == list(cases.PAGES)
    for row in document["rows"]:
        assert (row["pair"], row["tokens"], row["block"]) == (DEMO, 32, 32)
        times = [row["ms"][name] for name in ("p20", "median", "p80")]
        assert times == sorted(times)
        assert all(math.isfinite(x) for x in (*times, *(row[name] for name in MEASURED)))
        assert min(times[0], row["bytes"], row["flop"], row["copy_ms"], row["of_floor"]) > 0
        assert row["difference"] == 0  # The operator is the reference here.
        assert row["reasons"].keys() == ON_CUDA
        assert all(row[name] is None and row["reasons"][name] for name in ON_CUDA)
        assert "skipped" not in row


def test_bytes_and_operations_are_those_that_the_work_needs(measured: Path) -> None:
    encode, decode, rotate = json.loads(measured.read_text())["rows"]
    states, keys, embed, rank = 2 * 15 * 3 * 64, 18 * 256, 640, 1024
    features = states + 4 * embed
    assert encode["flop"] == 2 * 32 * features * rank
    assert decode["flop"] == 2 * 32 * rank * 2 * keys
    assert rotate["flop"] == 3 * 33 * keys
    # States and embeddings, map, latent; means and scales, angles; indices and blanks.
    numbers = 32 * states + 33 * embed + features * rank + 32 * rank
    assert encode["bytes"] == 2 * numbers + 4 * 2 * (features + 32 * 32) + 8 * (32 + 33) + 32
    # Latent, map, sink, states; bias, angles, scales; positions and slots.
    numbers = 32 * rank + rank * 2 * keys + 256 + 33 * 2 * keys
    assert decode["bytes"] == 2 * numbers + 4 * (2 * keys + 2 * 33 * 128 + 36) + 8 * 2 * 33
    # Keys twice; angles and scales; slots.
    assert rotate["bytes"] == 2 * 2 * 33 * keys + 4 * (2 * 128 + 18) + 8 * 33


def test_the_plot_is_drawn_from_the_data_alone(measured: Path, tmp_path: Path) -> None:
    before = measured.read_bytes()
    image = tmp_path / "kernels.png"
    kernels.main(["--from", str(measured), "--plot", str(image)])
    assert image.read_bytes().startswith(b"\x89PNG")
    assert measured.read_bytes() == before


@pytest.mark.parametrize("demanded", [True, False])
def test_without_matplotlib_it_says_so(
    demanded: bool,
    measured: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    if demanded:
        with pytest.raises(SystemExit, match=r"no plot: .*matplotlib"):
            kernels.main(["--from", str(measured), "--plot", "x.png"])
    else:
        kernels.main(["--from", str(measured)])
        assert "no plot: " in capsys.readouterr().out


def test_what_does_not_fit_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_memory", lambda: 10**6)
    document = run(tmp_path)
    assert [row["operation"] for row in document["rows"]] == list(cases.PAGES)
    assert all("GB, 0.0 GB are free" in row["skipped"] for row in document["rows"])
    assert all("ms" not in row for row in document["rows"])
    document["device"] = "a GPU"
    assert verdicts.summary(document)[-1] == "skipped 3"


def test_where_only_the_reference_does_not_fit_its_columns_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = cases.Side(1, 1, 16, 8)
    monkeypatch.setitem(cases.PAIRS, DEMO, cases.Pair(side, side, 8))
    needs = {name: (0, 10**18) for name in cases.PAGES}
    monkeypatch.setattr(rows, "needed", lambda *_: needs)
    for row in run(tmp_path)["rows"]:
        assert row["ms"]["median"] > 0
        assert row["difference"] is None
        assert row["reasons"]["difference"].startswith("needs 1000000000.0 GB")


def test_a_column_that_runs_out_of_memory_is_null_with_the_reason() -> None:
    def greedy() -> float:
        raise torch.cuda.OutOfMemoryError("tried to allocate 99 GiB")

    row: dict[str, Any] = {"reasons": {"other": "why"}}
    rows.attempt(row, "eager_ratio", greedy, "")
    assert row["eager_ratio"] is None
    assert row["reasons"]["eager_ratio"] == "OutOfMemoryError: tried to allocate 99 GiB"
    rows.attempt(row, "eager_ratio", lambda: 2.0, "")
    assert row == {"eager_ratio": 2.0, "reasons": {"other": "why"}}
    with pytest.raises(ZeroDivisionError):  # Nothing else is hidden.
        rows.attempt(row, "eager_ratio", lambda: 1 / 0, "")


def test_when_the_time_is_up_no_row_begins_and_those_measured_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, now = [], [0.0]

    def fill(row: dict[str, Any], *_: Any) -> None:
        if now[0]:
            saved.extend(json.loads((tmp_path / "kernels.json").read_text())["rows"])
        del row["skipped"]
        now[0] += 60

    clock = SimpleNamespace(monotonic=lambda: now[0])
    for module in (kernels, rows):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(kernels, "measure", fill)
    monkeypatch.setattr(
        rows, "cases", lambda *_: (SimpleNamespace(operation=name) for name in cases.PAGES)
    )
    written = run(tmp_path, "--seconds", "100", "--tokens", "32", "64")["rows"]
    assert ["skipped" in row for row in written] == [False, False, True, True, True, True]
    assert {row["skipped"] for row in written[2:]} == {rows.NO_TIME}
    # The first row was on the disk before the second one began.
    assert ["skipped" in row for row in saved] == [False, True, True, True, True, True]


class Event:
    """A CUDA event, by the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.at - self.at)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_a_gpus_columns_are_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps on a CPU, the kernels interpreted: a machine is lent too rarely to find a typo."""
    side = cases.Side(2, 1, 32, 64)
    monkeypatch.setitem(cases.PAIRS, DEMO, cases.Pair(side, side, 32, 1))
    monkeypatch.setattr(device, "CUDA", True)
    monkeypatch.setattr(device, "machine", lambda: {"device": "a GPU"})
    slept: list[int] = []
    faked = {"Event": Event, "_sleep": slept.append, "mem_get_info": lambda: (10**9, 10**9)}
    for name in ("synchronize", "empty_cache"):
        faked[name] = lambda: None
    for name, fake in faked.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(f.__name__) or f)
    for row in run(tmp_path)["rows"]:
        assert row["reasons"] == {}
        assert "skipped" not in row
        columns = (row["device_ms"]["p20"], *(row[name] for name in ON_CUDA - {"device_ms"}))
        assert all(math.isfinite(x) for x in columns)
        assert row["device_of_floor"] < 1
        assert row["eager_ratio"] > 0
    assert compiled == list(cases.PAGES)
    # Of three runs and the floors', each sleeps but its first.
    assert len(slept) == 2 * (3 + 3 + 2)


def made_up(**columns: Any) -> dict[str, Any]:
    row = {"pair": "8B → 8B", "tokens": 4096, "operation": "encode_states", "reasons": {}}
    row |= {"difference": 0.002, "of_floor": 0.71, "device_of_floor": 0.8}
    return row | {"eager_ratio": 3.1, "compiled_ratio": 1.6} | columns


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({}, "reached"),
        ({"of_floor": 0.69}, "short"),
        ({"of_floor": 0.69, "tokens": 2048}, "reached"),
        ({"of_floor": 0.69, "pair": DEMO}, "reached"),
        ({"of_floor": 0.79, "operation": "rotate_paged"}, "short"),
        ({"of_floor": 0.81, "operation": "rotate_paged"}, "reached"),
        ({"eager_ratio": 2.9}, "short"),
        ({"compiled_ratio": 1.4, "tokens": 128}, "short"),
        ({"compiled_ratio": None, "reasons": {"compiled_ratio": "why"}}, "unknown"),
        (
            {"compiled_ratio": None, "of_floor": 0.1, "reasons": {"compiled_ratio": "why"}},
            "short",
        ),
        ({"difference": 0.02}, "wrong"),
        ({"difference": math.nan}, "wrong"),
        ({"difference": None, "reasons": {"difference": "why"}}, "unknown"),
        ({"skipped": "why"}, "skipped"),
    ],
)
def test_bars_are_judged_row_by_row_on_a_gpu(columns: dict[str, Any], word: str) -> None:
    row = made_up(**columns)
    line, counts = verdicts.summary({"device": "a GPU", "rows": [row]})
    assert line.startswith(f"{word} {row['pair']}, {row['tokens']} tokens, {row['operation']}")
    assert ("why" in line) == ("why" in str(columns))
    assert counts == f"{word} 1"
    assert "not judged" in verdicts.summary({"device": None, "rows": [row]})[0]


def test_wrong_results_fail_the_run(tmp_path: Path) -> None:
    data = tmp_path / "kernels.json"
    data.write_text(json.dumps({"device": "a GPU", "rows": [made_up(difference=1.0)]}))
    with mock.patch.object(kernels, "plot"), pytest.raises(SystemExit, match="wrong"):
        kernels.main(["--from", str(data)])
