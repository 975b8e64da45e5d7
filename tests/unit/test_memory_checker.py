"""`MemoryCompatibilityChecker`: every figure says where it comes from, and none is invented."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from awareness_vllm import MemoryCompatibilityChecker
from awareness_vllm.cli.main import main
from awareness_vllm.compatibility import appraisal, self_test
from awareness_vllm.compatibility.context import SelfTest
from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.compatibility.load_time.speed import REFERENCE
from awareness_vllm.compatibility.report import CompatibilityReport, level_of
from awareness_vllm.errors import BadInput, PackageCorrupt
from awareness_vllm.models import describe
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.certificate import Certificate, Interval
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit

Models = tuple[Path, Path]
TEXT = "The quick brown fox jumps over the lazy dog, and the other dogs look on. " * 8
KEPT = {(100, 0): 0.97, (100, 16): 0.98, (1000, 0): 0.8, (1000, 16): 0.85, (1000, 48): 0.9}


def interval(mean: float, half: float = 0.01) -> dict[str, float]:
    return {"mean": mean, "ci_low": mean - half, "ci_high": mean + half}


def certificate(facts: float = 1.0, texts: int = 48, margin: float | None = None) -> dict[str, Any]:
    """As if it had been measured: `KEPT`, by context and tail, with a `margin` controls too."""
    plans = [
        {
            "context": context,
            "tail": tail,
            "cost": 0.1 + tail / 100,
            "retention": interval(kept),
            "kinds": {"poems": interval(kept - 0.1)},
            "top1": 0.5,
            "tokens_only": interval(0),
            **controlled(kept, margin),
        }
        for (context, tail), kept in KEPT.items()
    ]
    metrics = {"semantic_preservation": [0.9, 0.7], "attention_fidelity": [0.6, 0.8]}
    document = {
        "protocol": {"texts": "", "cases": "", "limit": 48, "context": 100, "continuation": 60},
        "texts": {"native": {"nll": 2.0}, "memory": {"nll": 2.1}},
        **{name: {} for name in ("cases", "facts_kinds", "facts_distances")},
        **{name: interval(0.97) for name in ("retention", "margin", "facts_margin")},
        "facts": interval(facts),
        "counts": {"texts": texts},
        "metrics": {**metrics, "gradient_ratio": 1, "gradient_stability": True, "n": 2},
        **{"plans": plans, "tier": None, "measured": "2026-11-23"},
        **{"hardware": "", "versions": {}},
    }
    return Certificate.model_validate(document).model_dump(mode="json")


def controlled(kept: float, margin: float | None) -> dict[str, Any]:
    """The fields of a plan that is better by a margin than its better control."""
    if margin is None:
        return {}
    controls = {"truncation": interval(kept - margin), "quotes": interval(0.1)}
    return {"controls": controls, "margin": interval(margin)}


@pytest.fixture(scope="module")
def plain(fitted: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fitted map that nobody measured."""
    path = tmp_path_factory.mktemp("plain") / "pair.wmatrix"
    fitted.save(path)
    return path


@pytest.fixture
def certify(plain: Path, tmp_path: Path) -> Any:
    """A factory of checkers whose map has such a certificate."""

    def make(**changes: Any) -> MemoryCompatibilityChecker:
        wmatrix = load(plain)
        manifest = wmatrix.manifest.model_copy(update={"certificate": certificate(**changes)})
        replace(wmatrix, manifest=manifest).save(tmp_path / "pair.wmatrix")
        return MemoryCompatibilityChecker([tmp_path / "pair.wmatrix"], store=tmp_path)

    return make


@pytest.fixture(scope="module")
def memory(tiny_models: Models) -> Package:
    return capture(tiny_models[0], TEXT)


@pytest.fixture(autouse=True)
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appraisal, "saved", lambda: None)


def described(report: CompatibilityReport) -> str:
    return "; ".join(f"{r.impact}: {r.description}" for r in report.risk_factors)


def test_the_certificate_speaks_for_a_memory_of_this_length(
    certify: Any, memory: Package, tiny_models: Models
) -> None:
    checker = certify()
    report = checker.check(package=memory, target_model=tiny_models[1])
    (entry,) = checker.registry
    expected = predict(entry.certificate, memory.manifest.tokens, 16)
    assert report.estimated_retention == report.compatibility_score == expected.mean
    assert report.confidence_interval == (expected.ci_low, expected.ci_high)
    assert (report.basis.kind, report.basis.digest) == ("measured", entry.digest)
    assert report.head_mapping_quality == pytest.approx(0.7)
    assert report.facts.mean == 1
    assert report.conditions["memory"]["nll"] == 2.1
    assert report.positional_basis.kind == "prior"
    assert report.load_times_s == {}
    assert report.target_memory_gb > 0
    assert [curve.tail for curve in report.curves] == [0, 16]


def test_configuration_changes_the_estimate(
    certify: Any, memory: Package, tiny_models: Models
) -> None:
    def kept(**config: Any) -> float:
        found = certify().check(package=memory, target_model=tiny_models[1], target_config=config)
        return found.estimated_retention

    assert kept(tail=0) < kept(tail=8) < kept(tail=16)
    with pytest.raises(BadInput, match="context_length"):
        kept(contextlength=5)
    with pytest.raises(BadInput, match="num_gpus"):
        kept(num_gpus=7)
    full = certify().check(
        package=memory, target_model=tiny_models[1], target_config={"context_length": 16}
    )
    assert "cannot be loaded" in described(full)
    assert (full.compatibility_score, full.level) == (0.0, "Poor")


def test_a_known_kind_of_text(certify: Any, memory: Package, tiny_models: Models) -> None:
    anything, poems = (
        certify().check(package=memory, target_model=tiny_models[1], kind=kind)
        for kind in (None, "poems")
    )
    assert poems.estimated_retention == pytest.approx(anything.estimated_retention - 0.1)
    assert "not on text like this" in described(anything)
    assert "not on text like this" not in described(poems)


@pytest.mark.parametrize(
    ("facts", "level", "impact"),
    [
        (0.9, "Excellent", None),
        (0.7, "Good", "medium"),
        (0.4, "Acceptable", "high"),
        (0.2, "Marginal", "high"),
        (-0.1, "Poor", "high"),
    ],
)
def test_lost_facts_lower_the_level(
    certify: Any,
    tiny_models: Models,
    facts: float,
    level: str,
    impact: str | None,
) -> None:
    short = capture(tiny_models[0], TEXT[:100])
    report = certify(facts=facts).check(package=short, target_model=tiny_models[1])
    assert report.estimated_retention > 0.95
    assert report.level == level
    assert ("names, places" in described(report)) == (impact is not None)
    if impact:
        assert f"{impact}: names, places" in described(report)


def test_advice_is_sorted_and_says_how_it_is_known(certify: Any, tiny_models: Models) -> None:
    listing = SimpleNamespace(source_model="source", token_count=1000)
    report = certify().check(listing, tiny_models[1].name)
    gains = [action.gain for action in report.actions]
    known = [gain for gain in gains if gain is not None]
    assert known == sorted(known, reverse=True)
    assert gains[len(known) :] == [None] * (len(gains) - len(known))
    tail = next(action for action in report.actions if "--tail 48" in action.description)
    assert (tail.basis, tail.gain) == ("measured", pytest.approx(0.05))
    assert not any("--tail 16" in action.description for action in report.actions)
    assert any("calibrate" in action.description for action in report.actions)
    assert report.actions[0].gain == pytest.approx(1 - 0.85)


def test_an_unknown_retention_is_none(plain: Path, memory: Package, tiny_models: Models) -> None:
    report = MemoryCompatibilityChecker([plain]).check(package=memory, target_model=tiny_models[1])
    assert (report.estimated_retention, report.basis, report.level) == (None, None, None)
    assert "Unknown" in report.recommendation
    assert "no certificate" in described(report)
    assert any("awareness certify" in action.description for action in report.actions)


def test_without_a_map_it_cannot_be_loaded(memory: Package, tiny_models: Models) -> None:
    report = MemoryCompatibilityChecker([]).check(package=memory, target_model=tiny_models[1])
    assert (report.compatibility_score, report.level) == (0.0, "Poor")
    assert "no W-Matrix leads" in described(report)
    # No published share takes the place of what a map would keep.
    assert (report.head_mapping_quality, report.estimated_load_time_s) == (None, None)
    assert report.target_memory_basis.kind == "exact"


def test_a_models_own_memory_is_a_copy(memory: Package, tiny_models: Models) -> None:
    report = MemoryCompatibilityChecker([]).check(package=memory, target_model=tiny_models[0])
    assert (report.estimated_retention, report.basis.kind) == (1.0, "exact")
    assert (report.level, report.facts.mean, report.actions) == ("Excellent", 1.0, ())


def test_published_figures_are_priors(tmp_path: Path) -> None:
    listing = SimpleNamespace(id="mem_xyz789", source_model="gpt-4", token_count=12_000)
    report = MemoryCompatibilityChecker([]).check(
        memory_listing=listing, target_model="llama-3.1-70b"
    )
    assert report.basis.kind == "prior"
    assert report.estimated_retention == pytest.approx(0.91, abs=0.02)
    assert report.ci_low < report.estimated_retention < report.ci_high
    assert "not measured here" in report.recommendation
    assert (report.memory, report.level) == ("mem_xyz789", level_of(0.91)[0])
    # 80 layers of 64 heads × 128, keys and values of 2 bytes each: the table has no KV heads.
    assert report.target_memory_gb == pytest.approx(12_000 * 80 * 64 * 128 * 2 * 2 / 1e9)
    # A quarter of the loss is the heads'; learned positions to RoPE lose 1 to 3 %.
    assert report.head_mapping_quality == pytest.approx(1 - 0.25 * 0.09, abs=0.003)
    assert report.positional_compatibility == pytest.approx(0.98)
    assert report.estimated_load_time_s > 0
    figures = ("head_mapping", "positional", "target_memory", "load_time")
    assert {getattr(report, f"{name}_basis").kind for name in figures} == {"prior"}
    assert report.load_times_s == {}
    assert "published figures alone" in described(report)


def test_what_no_table_has_stays_unknown() -> None:
    listing = SimpleNamespace(source_model="gpt-4o", token_count=12_000)
    report = MemoryCompatibilityChecker([]).check(listing, "gemini-pro")
    assert report.estimated_retention is not None
    # No architecture of either is published, only the share of the loss.
    assert report.positional_compatibility == pytest.approx(1 - 0.2 * 0.07, abs=0.003)
    assert (report.target_memory_gb, report.load_time_basis) == (None, None)


@pytest.mark.parametrize(
    ("listing", "target", "says"),
    [
        (SimpleNamespace(source_model="gpt-4", token_count=9), "lama-3.1-70b", "LLaMA 3.1 70B"),
        (SimpleNamespace(source_model="gpt-5", token_count=9), "gpt-4", "GPT-4"),
        (SimpleNamespace(source_model="gpt-4", token_count=0), "gpt-4", "lacks"),
        (SimpleNamespace(source_model=None, token_count=5), "gpt-4", "lacks"),
        (None, "gpt-4", "one memory and one target"),
    ],
)
def test_an_unknown_memory_or_model_is_an_error(listing: Any, target: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        MemoryCompatibilityChecker([]).check(listing, target)


def test_tensors_that_contradict_the_geometry(
    memory: Package, tiny_models: Models, tmp_path: Path
) -> None:
    path = publish(memory, tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["layers.1.value"] = tensors["layers.1.value"][:, :, :-1].contiguous()
    save_file(tensors, path, metadata)
    with pytest.raises(PackageCorrupt, match=r"layers\.1\.value"):
        MemoryCompatibilityChecker([]).check(package=path, target_model=tiny_models[1])


def test_a_measurement_on_the_memory_stands_beside_the_certificates_word(
    certify: Any, memory: Package, tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def measured(*given: Any) -> SelfTest:
        asked.append(given)
        return SelfTest({"native": 1.0}, Interval(mean=0.5, ci_low=0.45, ci_high=0.55), 90, 30)

    monkeypatch.setattr(self_test, "measure", measured)
    expected = certify().check(package=memory, target_model=tiny_models[1])
    report = certify().check(package=memory, target_model=tiny_models[1], measure=True)
    assert (report.estimated_retention, report.basis) == (
        expected.estimated_retention,
        expected.basis,
    )
    assert (expected.on_itself, report.on_itself.mean) == (None, 0.5)
    assert report.conditions == {"native": {"nll": 1.0}}
    assert asked[0][3] == 16
    with pytest.raises(BadInput, match="nothing to measure"):
        MemoryCompatibilityChecker([]).check(
            package=memory, target_model=tiny_models[1], measure=True
        )


def test_measured_without_a_certificate(
    plain: Path, memory: Package, tiny_models: Models, tmp_path: Path
) -> None:
    checker = MemoryCompatibilityChecker([plain], store=tmp_path)
    path = publish(memory, tmp_path)
    (tmp_path / f"mem_{'0' * 32}.safetensors").write_bytes(b"no package")
    publish(capture(tiny_models[1], "another model's"), tmp_path)
    alone = checker.check(package=path.stem, target_model=tiny_models[1], measure=True)
    assert (alone.basis.kind, alone.basis.digest) == ("measured", memory.manifest.payload)
    assert alone.estimated_retention == alone.on_itself.mean
    assert set(alone.conditions) == {
        *("native", "memory", "tokens_only", "none"),
        *("memory_tail_16", "tokens_only_tail_16"),
    }
    publish(capture(tiny_models[0], "something else"), tmp_path)
    found = checker.check(package=path.stem, target_model=tiny_models[1], measure=True)
    assert set(found.conditions) == {*alone.conditions, "wrong_memory"}
    # Kernels choose their way by where a tensor lies in memory: the last bits may differ.
    assert found.conditions["memory"] == pytest.approx(alone.conditions["memory"], rel=1e-5)


def test_load_times_come_from_the_doctor(
    certify: Any, memory: Package, tiny_models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"cold": 0.3, "warm": 0.1, "hot": 0.0}
    monkeypatch.setattr(appraisal, "saved", lambda: REFERENCE)
    monkeypatch.setattr(appraisal, "load_times_s", lambda *_, **__: times)
    report = certify().check(package=memory, target_model=tiny_models[1])
    assert (report.load_times_s, report.estimated_load_time_s) == (times, 0.3)
    assert report.load_time_basis.kind == "measured"


def test_the_command(
    certify: Any,
    memory: Package,
    tiny_models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    certify()
    path = publish(memory, tmp_path / "store")
    common = ["check", path.stem, "--store", str(tmp_path / "store"), "--target"]
    common += [str(tiny_models[1]), "--wmatrix", str(tmp_path / "pair.wmatrix")]
    assert main([*common, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["basis"]["kind"] == "measured"
    assert main([*common, "--html", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert "estimated retention" in shown
    assert path.stem in (tmp_path / "page.html").read_text()
    assert main(["check", "--source", "gpt-4", "--target", "gpt-4o"]) == 1
    assert "lacks" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_loads_no_model_library_for_a_config_that_was_read_before(
    certify: Any,
    memory: Package,
    tiny_models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    describe._from_folder.cache_clear()
    certify().check(package=memory, target_model=tiny_models[1])
    script = """
import sys
from awareness_vllm.cli.main import main
status = main(sys.argv[1:])
print(sorted({"torch", "transformers", "tokenizers", "vllm"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""
    given = ["check", str(publish(memory, tmp_path)), "--target", str(tiny_models[1]), "--json"]
    given += ["--wmatrix", str(tmp_path / "pair.wmatrix")]
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert json.loads(done.stdout)["basis"]["kind"] == "measured"
