"""The kernels' benchmark: every column is there or says why not, and a GPU's bars are judged."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_benchmark import cases, clock, device, predicted, rows, shapes, verdicts

pytestmark = [pytest.mark.unit, pytest.mark.nightly]

DEMO = "SmolLM2-135M → Gemma-3-270M"
RUN = ["--pairs", DEMO, "--tokens", "32", "--repeats", "1"]
ON_CUDA = {"difference", "eager_ratio", "compiled_ratio"} | {
    prefix + name
    for prefix in ("", "device_")
    for name in ("ms", "product_ms", "copy_ms", "of_floor")
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


def test_without_a_device_every_row_is_predicted_and_says_not_measured(
    measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(measured.read_text())
    assert document["versions"].keys() == {"python", "torch", "triton", "cuda", "driver"}
    assert document["versions"]["torch"] == torch.__version__
    assert document["hardware"]
    assert document["peaks"]["sheet"]
    assert document["pairs"][DEMO]["rank"] == 1024
    assert [row["operation"] for row in document["rows"]] == list(cases.PAGES)
    for row in document["rows"]:
        assert (row["pair"], row["tokens"]) == (DEMO, 32)
        assert all(math.isfinite(x) and x >= 0 for x in row["predicted"].values())
        assert row["skipped"] == rows.NO_CUDA
        assert not ON_CUDA & row.keys()
    kernels.main(["--from", str(measured)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {DEMO}")]
    assert len(lines) == len(cases.PAGES)
    assert all(line.endswith("not measured: no CUDA device |") for line in lines)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_what_does_not_fit_is_left_out_with_the_reason(
    gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_memory", lambda: 10**3)
    document = run(tmp_path)
    assert [row["operation"] for row in document["rows"]] == list(cases.PAGES)
    assert all("GB, 0.0 GB are free" in row["skipped"] for row in document["rows"])
    assert all("ms" not in row for row in document["rows"])
    document["device"] = "a GPU"
    assert verdicts.summary(document)[-1] == "skipped 3"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_where_only_the_reference_does_not_fit_its_columns_say_so(
    gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = {name: (0, 10**18) for name in cases.PAGES}
    monkeypatch.setattr(rows, "needed", lambda *_: needs)
    for row in run(tmp_path)["rows"]:
        assert row["ms"]["median"] > 0
        for column in ("difference", "eager_ratio", "compiled_ratio"):
            assert row[column] is None
            assert row["reasons"][column].startswith("needs 1000000000.0 GB")


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_when_the_time_is_up_no_row_begins_and_those_measured_stay(
    gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, now = [], [0.0]

    def fill(row: dict[str, Any], *_: Any) -> None:
        if now[0]:
            saved.extend(json.loads((tmp_path / "kernels.json").read_text())["rows"])
        del row["skipped"]
        row.update({name: x for name, x in made_up().items() if name not in row})
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU's steps on a CPU, the kernels interpreted, for a pair that is small enough: a machine
    is lent too rarely to find a typo. What it slept, to let the host queue."""
    side = shapes.Side(2, 1, 32, 64)
    for module in (shapes, rows, kernels):
        monkeypatch.setitem(module.PAIRS, DEMO, shapes.Pair(side, side, 32, 1))
    monkeypatch.setattr(device, "CUDA", True)
    monkeypatch.setattr(device, "machine", lambda: {"device": "a GPU"})
    peaks = predicted.CARDS[predicted.ASSUMED]
    monkeypatch.setattr(kernels, "peaks", lambda *_: peaks)
    slept: list[int] = []
    faked = {"Event": Event, "_sleep": slept.append, "mem_get_info": lambda: (10**9, 10**9)}
    for name in ("synchronize", "empty_cache"):
        faked[name] = lambda: None
    for name, fake in faked.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return slept


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted there")
def test_a_gpus_columns_are_filled_in(
    gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(f.__name__) or f)
    for row in run(tmp_path)["rows"]:
        assert row["reasons"] == {}
        assert "skipped" not in row
        for name in ("ms", "device_ms"):
            times = [row[name][part] for part in ("p20", "median", "p80")]
            assert times == sorted(times)
        columns = [row[name] for name in ON_CUDA - {"ms", "device_ms"}]
        assert all(math.isfinite(x) for x in (*columns, row["device_ms"]["p20"]))
        assert row["difference"] < verdicts.RIGHT
        assert row["device_of_floor"] < 1
        assert row["eager_ratio"] > 0
    assert compiled == list(cases.PAGES)
    # Of three runs and the floors', each sleeps but its first.
    assert len(gpu) == 2 * (3 + 3 + 2)


def test_a_devices_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"product_ms": 2.0, "copy_ms": 0.5, "of_floor": 1.0}
    monkeypatch.setattr(clock, "against_floors", lambda *_: found)
    card = SimpleNamespace(name="a GPU", multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    peaks = clock.peaks(predicted.CARDS["H200"], 1)
    assert (peaks.name, peaks.multiprocessors, peaks.sheet) == ("a GPU", 7, False)
    assert peaks.copy == pytest.approx(2**30 / 0.5e-3)
    assert peaks.product == pytest.approx(2 * 8192**3 / 2e-3)


def made_up(**columns: Any) -> dict[str, Any]:
    row = {"pair": "8B → 8B", "tokens": 4096, "operation": "encode_states", "reasons": {}}
    row |= {"kernels": "pack + product", "device_ms": {"median": 3.0}}
    row["predicted"] = predicted.predict(
        shapes.PAIRS[row["pair"]], row["tokens"], row["operation"], predicted.CARDS["H200"]
    )
    row |= {"difference": 0.002, "of_floor": 0.7, "device_of_floor": 0.81}
    return row | {"eager_ratio": 4.1, "compiled_ratio": 2.1} | columns


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({}, "reached"),
        ({"device_of_floor": 0.79}, "short"),
        ({"device_of_floor": 0.79, "tokens": 2048}, "reached"),
        ({"device_of_floor": 0.79, "pair": DEMO}, "reached"),
        ({"device_of_floor": 0.89, "operation": "rotate_paged"}, "short"),
        ({"device_of_floor": 0.91, "operation": "rotate_paged"}, "reached"),
        ({"eager_ratio": 3.9}, "short"),
        ({"compiled_ratio": 1.9, "tokens": 128}, "short"),
        ({"compiled_ratio": None, "reasons": {"compiled_ratio": "why"}}, "unknown"),
        (
            {"compiled_ratio": None, "device_of_floor": 0.1, "reasons": {"compiled_ratio": "why"}},
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
    peaks = asdict(predicted.CARDS["H200"])
    document = {"device": "a GPU", "peaks": peaks, "rows": [made_up(difference=1.0)]}
    data.write_text(json.dumps(document))
    with mock.patch.object(kernels, "plot"), pytest.raises(SystemExit, match="wrong"):
        kernels.main(["--from", str(data)])
