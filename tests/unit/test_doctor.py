"""`awareness doctor`: every fault has a remedy, and the machine is measured once."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from awareness_vllm.cli.main import main
from awareness_vllm.compatibility.load_time import speed as calibration_module
from awareness_vllm.compatibility.load_time.speed import FILE, Calibration, saved
from awareness_vllm.errors import BadInput
from awareness_vllm.files import home, wmatrices_dir
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving import doctor, load_benchmark
from awareness_vllm.serving import plugin as register
from awareness_vllm.serving.load_benchmark import calibrated
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import WMatrixEntry

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


def a_calibration(**changes: Any) -> Calibration:
    rates = {name: 1.0 for name in Calibration.model_fields if name.endswith("_s")}
    fields = {"measured": "2026-11-23T00:00:00Z", "threads": 2, "load": 0.0, **rates}
    fields |= {"hardware": hardware(), "versions": versions()}
    return Calibration.model_validate(fields | changes)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Calibration]:
    """What was measured, one after the other, without measuring anything."""
    made: list[Calibration] = []

    def calibrate() -> Calibration:
        made.append(a_calibration(align_flop_per_s=float(len(made) + 1)))
        return made[-1]

    monkeypatch.setattr(load_benchmark, "calibrate", calibrate)
    return made


def by_name(results: list[doctor.Check]) -> dict[str, doctor.Check]:
    return {check.name: check for check in results}


def test_whatever_is_not_ok_has_a_remedy() -> None:
    results = doctor.checks([Path("/no.wmatrix")], "/no/model")
    assert {"python", "torch", "vllm", "home", "models", "W-Matrix"} <= set(by_name(results))
    assert all(check.remedy for check in results if check.status != "ok")
    assert not any(check.remedy for check in results if check.status == "ok")


# Libraries


@pytest.mark.parametrize(
    ("version", "status"), [("0.32.0", "ok"), ("0.29.1", "problem"), ("0.34.0", "problem")]
)
def test_vllms_version(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: version)
    check = doctor.vllm()
    assert check.status == status
    assert version in check.found


def test_without_vllm_there_is_only_no_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name.startswith("vllm"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.vllm().status == "warning"


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "problem"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "problem"),
        ("", "ok"),
    ],
)
def test_a_cuda_build_beside_a_cpu_torch(
    source: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dragged_in_here.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "CUDA_EXTRAS", ("dragged_in_here", "not_there_at_all"))
    monkeypatch.delitem(__import__("sys").modules, "dragged_in_here", raising=False)
    (check,) = doctor.broken_builds()
    assert (check.name, check.status) == ("dragged_in_here", status)
    assert status == "ok" or "pip uninstall -y dragged_in_here" in (check.remedy or "")


@pytest.mark.parametrize(
    ("allowed", "status"),
    [(None, "ok"), ("awareness", "ok"), ("a,awareness", "ok"), ("a", "warning"), ("", "warning")],
)
def test_an_allow_list_without_us(allowed: str | None, status: str) -> None:
    environ = {} if allowed is None else {"VLLM_PLUGINS": allowed}
    assert doctor.allowed_plugins(environ).status == status


def test_plugins_that_nobody_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.registered_plugins().status == "ok"
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    check = doctor.registered_plugins()
    assert check.status == "problem"
    assert all(group in check.found for group in doctor.PLUGIN_GROUPS)


# Folders


def test_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert doctor.writable_home().status == "ok"
    (tmp_path / "file").touch()
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "file" / "home"))
    assert doctor.writable_home().status == "problem"
    assert main(["doctor", "--json"]) == 1
    document = json.loads(capfd.readouterr().out)
    assert document["problems"] == 1
    assert document["calibration"] is None


def test_what_lies_at_home(tiny_models: tuple[Path, Path]) -> None:
    assert by_name(doctor.checks())["models"].status == "warning"
    (home() / "models").mkdir(parents=True)
    (home() / "models" / "tiny").symlink_to(tiny_models[0])
    (home() / "anchors" / "poems").mkdir(parents=True)
    results = by_name(doctor.checks())
    assert (results["models"].status, results["models"].found) == ("ok", "tiny")
    assert (results["anchors"].status, results["anchors"].found) == ("ok", "poems")


def test_w_matrices_are_looked_at_one_by_one(wmatrix: WMatrix) -> None:
    (check,) = doctor.check_wmatrices([], None)
    assert (check.status, check.remedy) == ("warning", "`awareness fit`")
    wmatrix.save(wmatrices_dir() / "good.wmatrix")
    (wmatrices_dir() / "damaged.wmatrix").write_bytes(b"nothing")
    results = list(doctor.check_wmatrices([Path("/no.wmatrix")], None))
    assert [check.status for check in results] == ["problem", "warning", "warning"]
    for name, check in zip(("no.wmatrix", "damaged", "good"), results, strict=True):
        assert name in check.found
    assert "not certified" in results[2].found


def test_a_certified_w_matrix_says_what_it_keeps(wmatrix: WMatrix) -> None:
    kept = {"mean": 0.9, "ci_low": 0.8, "ci_high": 1.0}
    protocol = {"texts": "", "cases": "", "limit": 8, "context": 300, "continuation": 60}
    plan = {"context": 300, "tail": 0, "cost": 0.1, "top1": 0.8, "kinds": {}}
    plan |= {"retention": kept, "tokens_only": kept}
    certificate = Certificate.model_validate(
        {
            **{
                "protocol": protocol,
                "metrics": None,
                "plans": [plan],
                "tier": None,
                "hardware": "",
            },
            **{"measured": "2026-11-23"},
            **{name: kept for name in ("retention", "margin", "facts", "facts_margin")},
            **{name: {} for name in ("texts", "cases", "facts_kinds", "facts_distances")},
            **{"counts": {"texts": 8}, "versions": {}},
        }
    )
    update = {"certificate": certificate.model_dump(mode="json")}
    manifest = wmatrix.manifest.model_copy(update=update)
    check = doctor.check_certificate(WMatrixEntry(Path("a.wmatrix"), manifest, "d"))
    assert check.status == "ok"
    assert "retention 0.900" in check.found


def test_no_w_matrix_leads_to_the_target(wmatrix: WMatrix, geometry: Geometry) -> None:
    wmatrix.save(wmatrices_dir() / "a.wmatrix")
    assert len(list(doctor.check_wmatrices([], wmatrix.manifest.target))) == 1
    results = list(doctor.check_wmatrices([], geometry))
    assert "none leads to tiny" in results[1].found


def test_the_target_that_is_asked_for(tiny_models: tuple[Path, Path]) -> None:
    geometry, (check,) = doctor.check_target(str(tiny_models[1]))
    assert geometry is not None
    assert (check.status, len(geometry.layers)) == ("ok", 2)
    geometry, (check,) = doctor.check_target("/no/model")
    assert (geometry, check.status) == (None, "problem")
    assert doctor.check_target(None) == (None, [])


# Speed


def test_the_machine_is_measured_once(
    measured: list[Calibration], capfd: pytest.CaptureFixture[str]
) -> None:
    for argv, times in ((["doctor"], 1), (["doctor", "--json"], 1), (["doctor", "--again"], 2)):
        capfd.readouterr()
        assert main(argv) == 0
        assert len(measured) == times
        if "--json" in argv:
            document = json.loads(capfd.readouterr().out)
            assert document["calibration"]["align_flop_per_s"] == 1.0
            assert document["file"] == str(home() / FILE)
    assert saved() == measured[-1]


@pytest.mark.parametrize("changes", [{"hardware": "another"}, {"versions": {"torch": "1"}}])
def test_another_machines_measures_are_taken_anew(
    changes: dict[str, Any], measured: list[Calibration]
) -> None:
    a_calibration(**changes).save()
    assert calibrated() == measured[0] == saved()


@pytest.mark.parametrize("content", ["", "{}", "[1", '{"format": "awareness-doctor/0"}'])
def test_a_file_that_says_nothing_is_none(content: str) -> None:
    home().mkdir(parents=True)
    assert saved() is None
    (home() / FILE).write_text(content)
    assert saved() is None


def test_a_problem_is_an_exit_status(
    measured: list[Calibration], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--wmatrix", "/no.wmatrix"]) == 1
    out = capfd.readouterr().out
    assert "problem  W-Matrix: no.wmatrix" in out
    assert "1 problems" in out


@pytest.mark.parametrize(("load", "status"), [(0.0, "ok"), (0.9, "ok"), (1.0, "warning")])
def test_a_machine_with_other_work_was_not_measured_well(
    load: float, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_module.os, "cpu_count", lambda: 2)
    assert doctor.speed(a_calibration(load=load)).status == status


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_benchmark, "SHORT", 16)
    monkeypatch.setattr(load_benchmark, "LONG", 256)
    monkeypatch.setattr(load_benchmark, "ROUNDS", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("with_vllm", [True, False])
def test_measuring_leaves_nothing_behind(with_vllm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_vllm:
        monkeypatch.setattr(load_benchmark, "cache_update", lambda: load_benchmark.scatter)
    calibration = load_benchmark.calibrate()
    assert calibration.here
    assert calibration.threads == torch.get_num_threads()
    assert list(home().iterdir()) == []


@pytest.mark.usefixtures("small")
def test_products_that_grow_faster_than_their_operations_leave_positive_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a processor whose caches hold the small map alone."""
    seconds = iter([[1.0, 2.0], [1.0, 2.0], [1.0], [0.1, 1.0, 1e3]])
    monkeypatch.setattr(load_benchmark, "medians", lambda *runs, **options: next(seconds))
    calibration = load_benchmark.calibrate()
    assert calibration.align_numbers_per_s > 0
    assert calibration.align_s(100, 1e6, 1e6) > 0


def test_a_memory_is_as_long_as_it_says() -> None:
    tokenizer = load_benchmark.synthetic_tokenizer()
    geometry = load_benchmark.geometry("source", 1, 1, 8, 8)
    for count in (load_benchmark.SHORT, load_benchmark.LONG):
        memory = load_benchmark.synthetic_memory(geometry, tokenizer, count)
        assert len(memory.tokens.ids) == count == memory.package.manifest.tokens
        assert tokenizer.encode(memory.text).ids[:-1] == memory.tokens.ids[:-1]


def test_the_scatter_writes_to_slots_and_nowhere_else() -> None:
    page = torch.zeros(3, 2, 4, 6)
    key, value = torch.full((2, 2, 3), 1.0), torch.full((2, 2, 3), 2.0)
    load_benchmark.scatter(None, key, value, page, torch.tensor([5, 11]))
    expected = torch.zeros(3, 2, 4, 6)
    for block, row in ((1, 1), (2, 3)):
        expected[block, :, row, :3], expected[block, :, row, 3:] = 1.0, 2.0
    assert torch.equal(page, expected)


def test_runs_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time does not count, and the median is each one's own."""
    clock = [0.0]
    monkeypatch.setattr(load_benchmark.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(load_benchmark, "TIME_LIMIT_S", 1e9)
    order: list[str] = []

    def takes(name: str, *seconds: float) -> Callable[[], None]:
        left = [99.0, *seconds]

        def run() -> None:
            order.append(name)
            clock[0] += left.pop(0)

        return run

    monkeypatch.setattr(load_benchmark, "ROUNDS", 3)
    assert load_benchmark.medians(takes("a", 1, 7, 2), takes("b", 5, 5, 50)) == [2, 5]
    assert order == ["a", "b"] * 4


def test_a_slow_machine_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_benchmark, "TIME_LIMIT_S", 0.0)
    runs: list[int] = []
    load_benchmark.medians(lambda: runs.append(1))
    assert len(runs) == 2


def test_an_unsupported_vllm_still_stops_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: "0.29.0")
    with pytest.raises(BadInput, match="does not support"):
        register.register()
