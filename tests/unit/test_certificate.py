"""The certificate has the measured figures, the monitor reports changes since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from awareness_vllm.anchors.corpus import Document, digest, sources
from awareness_vllm.anchors.corpus import load as load_texts
from awareness_vllm.cli.format import lines
from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput, QualityUnreachable, WMatrixCorrupt
from awareness_vllm.evaluate import certify as certify_module
from awareness_vllm.evaluate import monitor
from awareness_vllm.evaluate.arms import PlanShape
from awareness_vllm.evaluate.certify import build_certificate, build_plan, certify
from awareness_vllm.evaluate.evaluate import CaseFigures, TextFigures
from awareness_vllm.evaluate.monitor import WMatrixMonitor
from awareness_vllm.wmatrix.certificate import (
    CONTROLS,
    Certificate,
    Interval,
    Metrics,
    Plan,
    Protocol,
    tier,
)
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.plans import cheapest

pytestmark = pytest.mark.unit

PROTOCOL = Protocol(texts="t", cases="c", limit=8, context=300, continuation=60)
METRICS = Metrics(
    semantic_preservation=(0.9, 0.8),
    attention_fidelity=(0.7, 0.9),
    gradient_ratio=1.1,
    gradient_stability=True,
    n=2,
)


def measured_plan(context: int, tail: int, cost: float, retention: float) -> Plan:
    interval = Interval(mean=retention, ci_low=0, ci_high=1)
    return Plan(
        context=context,
        tail=tail,
        cost=cost,
        retention=interval,
        kinds={"poems": interval, "lists": interval},
        top1=retention,
        tokens_only=interval,
        facts=interval,
    )


PLANS = [
    measured_plan(1000, 0, 0.2, 0.8),
    measured_plan(1000, 48, 0.25, 0.85),
    measured_plan(300, 64, 0.4, 0.97),
    measured_plan(300, 0, 0.2, 0.9),
    measured_plan(300, 16, 0.3, 0.95),
]
CONDITIONS = ("native", "memory", "tokens_only", "wrong_memory", "none")


def texts(retention: float = 0.9, count: int = 8) -> TextFigures:
    """Texts of two kinds; the memory arm keeps so much of what reading brings."""
    rng = np.random.default_rng(0)
    native = 3 + rng.random(count)
    brought = 0.5 + rng.random(count)
    nll = dict(zip(CONDITIONS, (0, 1 - retention, 0.8, 1.1, 1), strict=True))
    conditions = {
        arm: np.stack((native + loss * brought, np.full(count, loss), np.full(count, 1 - loss)), 1)
        for arm, loss in nll.items()
    }
    names = [f"{'poems' if i % 4 else 'lists'}/{i}.txt" for i in range(count)]
    return TextFigures(names, conditions)


def cases(native: int = 6, memory: int = 3, count: int = 8) -> CaseFigures:
    exact = dict(zip(CONDITIONS, (native, memory, 0, 0, 0), strict=True))
    return CaseFigures(
        {arm: np.stack((np.arange(count) < n, np.zeros(count)), 1) for arm, n in exact.items()},
        kinds=["city", "code"] * (count // 2),
        distances=[20] * (count // 2) + [200] * (count // 2),
    )


def test_a_certificate_has_the_measured_figures() -> None:
    result = build_certificate(PROTOCOL, texts(0.9), cases(), METRICS, PLANS)
    assert result.retention.mean == pytest.approx(0.9)
    assert result.facts.mean == pytest.approx(0.5)
    assert result.facts.ci_low < 0.5 < result.facts.ci_high
    assert result.margin.ci_low > 0
    assert result.facts_margin.mean == pytest.approx(3 / 8)
    # Of cases 0 to 7 the target recalls 0 to 5, the memory 0 to 2.
    assert result.facts_kinds["city"].mean == pytest.approx(2 / 3)
    assert result.facts_kinds["code"].mean == pytest.approx(1 / 3)
    assert {k: round(i.mean, 6) for k, i in result.facts_distances.items()} == {
        "from   0 tokens": 0.75,
        "from 128 tokens": 0,
    }
    assert result.counts == {"texts": 8, "cases": 8}
    assert result.texts["memory"]["top1"] == pytest.approx(0.9)


@pytest.mark.parametrize(("wanted", "tail"), [(0.5, 0), (0.9, 0), (0.91, 16), (0.97, 64)])
def test_the_cheapest_plan_reaches_the_quality_target(wanted: float, tail: int) -> None:
    result = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS)
    assert cheapest(result, wanted).tail == tail


@pytest.mark.parametrize(("context", "tail"), [(None, 0), (10, 0), (300, 0), (301, 48), (1000, 48)])
def test_plans_are_of_the_next_longer_measured_context(context: int | None, tail: int) -> None:
    result = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS)
    assert cheapest(result, 0.82, context).tail == tail


def test_a_plan_has_the_retention_of_each_kind() -> None:
    result = build_plan(300, PlanShape(), 0.2, texts(0.9), cases())
    assert result.kinds.keys() == {"poems", "lists"}
    assert result.kinds["lists"].mean == pytest.approx(0.9)
    assert result.tokens_only.mean == pytest.approx(0.2)
    assert result.top1 == pytest.approx(0.9)
    assert result.facts is not None
    assert result.facts.mean == pytest.approx(0.5)


def test_an_unreachable_quality_target_names_the_best_plan() -> None:
    result = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS)
    with pytest.raises(QualityUnreachable, match=r"0\.970, with the last 64"):
        cheapest(result, 0.98)


def test_recall_needs_facts_that_the_native_arm_recalls() -> None:
    with pytest.raises(BadInput, match="native arm"):
        build_certificate(PROTOCOL, texts(), cases(native=0, memory=0), METRICS, [])


@pytest.mark.parametrize(
    ("retention", "facts", "expected"),
    [(0.95, 0.9, 1), (0.95, 0.7, 2), (0.95, 0.0, 4), (0.8, 0.9, 3), (0.59, 1.0, None)],
)
def test_tiers_need_retention_and_facts(
    retention: float, facts: float, expected: int | None
) -> None:
    assert tier(retention, facts) == expected


@pytest.fixture
def certified(wmatrix: WMatrix, tmp_path: Path) -> Path:
    document = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS).model_dump(mode="json")
    manifest = wmatrix.manifest.model_copy(update={"certificate": document})
    path = tmp_path / "pair.wmatrix"
    replace(wmatrix, manifest=manifest).save(path)
    return path


def test_the_files_digest_covers_the_certificate(certified: Path) -> None:
    raw = certified.read_bytes()
    result = load(certified).manifest.certificate
    assert result is not None
    mean = str(result["retention"]["mean"]).encode()
    assert raw.count(mean) >= 1
    better = mean[:-1] + (b"1" if mean[-1:] != b"1" else b"2")
    certified.write_bytes(raw.replace(mean, better, 1))
    with pytest.raises(WMatrixCorrupt, match="payload"):
        load(certified)


def test_inspect_prints_it(certified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(certified)]) == 0
    printed = capsys.readouterr().out
    assert "retention                           0.900" in printed
    assert "not certified" not in printed
    assert main(["inspect", str(certified), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is True


def test_without_a_certificate_the_summary_says_so(
    wmatrix: WMatrix, certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wmatrix.save(tmp_path / "plain.wmatrix")
    assert main(["inspect", str(tmp_path / "plain.wmatrix")]) == 0
    assert "not certified" in capsys.readouterr().out
    assert wmatrix.manifest.standing == "not certified"
    assert load(certified).manifest.standing == "certified: retention 0.900, facts 0.50 of native"


def test_lines_name_every_kind() -> None:
    document = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS).model_dump(mode="json")
    text = "\n".join(lines(document))
    assert "poems" in text
    assert "lists" in text
    assert Certificate.model_validate(document).tier == 3


@pytest.fixture
def fitted(fitted: WMatrix, tmp_path: Path) -> Path:
    """A map between the tiny models, with a certificate that is not theirs: what is measured is
    set by each test."""
    document = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS).model_dump(mode="json")
    manifest = fitted.manifest.model_copy(update={"certificate": document})
    path = tmp_path / "tiny.wmatrix"
    replace(fitted, manifest=manifest).save(path)
    return path


@pytest.mark.slow
def test_lengths_and_plans_are_measured(
    tiny_models: tuple[Path, Path],
    fitted: Path,
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def with_plans(*args: object, shapes: Sequence[PlanShape], **kwargs: object) -> CaseFigures:
        result = cases()
        for shape in shapes:
            native = result.conditions["native"]
            for arm in ("memory", "tokens_only", *CONTROLS, *(["quoted"] if shape.reread else [])):
                recalls = arm in ("memory", "quoted") and shape.reread
                exact = native if recalls else result.conditions["memory"]
                result.conditions[shape.condition(arm)] = exact
        return result

    # No random model recalls a fact, or gains anything by reading.
    monkeypatch.setattr(certify_module, "evaluate_cases", with_plans)
    kept = {"mean": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    monkeypatch.setattr(TextFigures, "retention", lambda *args: kept)
    none = {"mean": 0.0, "ci_low": -0.1, "ci_high": 0.1}
    monkeypatch.setattr(TextFigures, "margin", lambda *args: none)
    measured = certify(
        load(fitted),
        *tiny_models,
        anchors,
        [{"context": "a", "question": "b", "answer": "c"}],
        limit=4,
        context=100,
        continuation=8,
        lengths=[400],
        progress=False,
    )
    result = Certificate.model_validate(measured.manifest.certificate)
    # These documents' names have no folder.
    assert result.protocol.sources == tuple(document.name for document in anchors)
    ways = {
        length: [(way.tail, way.reread) for way in result.plans if way.context == length]
        for length in (100, 400)
    }
    assert sorted(ways[100]) == [(tail, n) for tail in (0, 16) for n in (0, 48)]
    assert sorted(ways[400]) == [(tail, n) for tail in (0, 16, 64) for n in (0, 48)]
    costs = [way.cost for way in result.plans if way.context == 100]
    assert costs == sorted(costs)
    assert {way.texts for way in result.plans} == {4}
    assert all(way.margin and set(way.controls) >= set(CONTROLS[:3]) for way in result.plans)
    assert all(("passages" in way.controls) == bool(way.reread) for way in result.plans)
    recalled = {way.reread: way.facts and way.facts.mean for way in result.plans if not way.tail}
    assert recalled == {0: None, 48: None}  # of the last length, 400 tokens
    of_facts = [way for way in result.plans if way.facts]
    assert {(way.context, way.tail) for way in of_facts} == {(100, 0), (100, 16)}
    assert {(way.reread, way.facts and way.facts.mean) for way in of_facts} == {
        (0, 0.5),
        (48, 1.0),
    }
    assert all(way.facts_margin and way.facts_kinds["city"]["native"] for way in of_facts)
    quoted = [(way.reread, way.facts_quoted, way.facts_quoted_margin) for way in of_facts]
    assert [bool(facts and margin) for _, facts, margin in quoted] == [bool(n) for n, *_ in quoted]
    assert {facts.mean for _, facts, _ in quoted if facts} == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize(("retention", "drifted"), [(0.9, False), (0.95, False), (0.5, True)])
def test_drift_is_retention_below_the_certificates_interval(
    tiny_models: tuple[Path, Path],
    fitted: Path,
    monkeypatch: pytest.MonkeyPatch,
    retention: float,
    drifted: bool,
) -> None:
    monkeypatch.setattr(monitor, "evaluate_texts", lambda *args, **kwargs: texts(retention))
    checker = WMatrixMonitor([Document("a", "b")], source=tiny_models[0], target=tiny_models[1])
    status = checker.check(fitted)
    assert status.drift_detected is drifted
    assert status.accuracy == pytest.approx(retention)
    assert bool(status.reasons) is drifted


@pytest.mark.slow
def test_changed_weights_are_drift_with_the_reason(
    tiny_models: tuple[Path, Path], fitted: Path, tmp_path: Path
) -> None:
    # The source in the target's place: other weights, another tokenizer, another cache.
    checker = WMatrixMonitor([], source=tiny_models[0], target=tiny_models[0])
    status = checker.check(fitted)
    assert status.drift_detected
    assert status.recommendation == "fit it again"
    assert any("weights" in reason for reason in status.reasons)
    assert any("tokenizer" in reason for reason in status.reasons)


def with_protocol(path: Path, **update: object) -> Path:
    """The same file, with other fields in its certificate's protocol."""
    wmatrix = load(path)
    assert wmatrix.manifest.certificate is not None
    protocol = wmatrix.manifest.certificate["protocol"] | update
    document = wmatrix.manifest.certificate | {"protocol": protocol}
    manifest = wmatrix.manifest.model_copy(update={"certificate": document})
    replace(wmatrix, manifest=manifest).save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [("poems", "lists"), ()], ids=["named", "version 0.1"])
def test_the_monitor_takes_the_certificates_own_texts(
    tiny_models: tuple[Path, Path],
    fitted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: tuple[str, ...],
) -> None:
    """Version 0.1 recorded the folders as the kinds of its plans."""
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    folders = (tmp_path / "home/held-out/poems", tmp_path / "home/anchors/lists")
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(f"{folder.name} and what is in them " * 20)
    documents = load_texts(folders)
    assert sources(documents) == ("poems", "lists")
    with_protocol(fitted, texts=digest(documents), sources=recorded)
    measured: list[Sequence[Document]] = []

    def evaluate(harness: object, given: Sequence[Document], **_: object) -> TextFigures:
        measured.append(given)
        return texts(0.9)

    monkeypatch.setattr(monitor, "evaluate_texts", evaluate)
    checker = WMatrixMonitor(source=tiny_models[0], target=tiny_models[1])
    assert checker.check(fitted).accuracy == pytest.approx(0.9)
    # By the name under which it is registered, with and without its suffix.
    load(fitted).register("the-pair")
    for name in ("the-pair", "the-pair.wmatrix"):
        assert checker.check(name).accuracy == pytest.approx(0.9)
    assert {d.name for given in measured for d in given} == {"poems/a.txt", "lists/a.txt"}
    (folders[0] / "b.txt").write_text("another one, which the certificate does not have " * 20)
    with pytest.raises(BadInput, match="held-out") as caught:
        checker.check(fitted)
    assert "poems" in str(caught.value.expected)


@pytest.mark.slow
def test_other_weights_of_the_same_shape_are_measured(
    tiny_models: tuple[Path, Path], fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "evaluate_texts", lambda *args, **kwargs: texts(0.5))
    wmatrix = load(fitted)
    tuned = wmatrix.manifest.target.model_copy(update={"weights": "w" * 64})
    manifest = wmatrix.manifest.model_copy(update={"target": tuned})
    replace(wmatrix, manifest=manifest).save(fitted)
    checker = WMatrixMonitor([Document("a", "b")], source=tiny_models[0], target=tiny_models[1])
    status = checker.check(fitted)
    assert status.accuracy == pytest.approx(0.5)
    assert status.recommendation == "fit it again"
    assert ["weights" in reason for reason in status.reasons] == [True, False]
    # Without texts the changed weights are reason enough.
    status = WMatrixMonitor([], source=tiny_models[0], target=tiny_models[1]).check(fitted)
    assert (status.drift_detected, status.accuracy) == (True, None)


def test_sources_are_folders_and_files() -> None:
    names = ("poems/a.txt", "poems/deep/b.txt", "art#0", "art#1", "c#/x#0", "one.txt")
    documents = [Document(name, "") for name in names]
    assert sources(documents) == ("poems", "art", "c#", "one.txt")


def test_a_map_without_certificate_cannot_drift(wmatrix: WMatrix, tmp_path: Path) -> None:
    wmatrix.save(tmp_path / "plain.wmatrix")
    status = WMatrixMonitor([]).check(tmp_path / "plain.wmatrix")
    assert (status.drift_detected, status.accuracy) == (False, None)
    assert "certify" in status.recommendation
