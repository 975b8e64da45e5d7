"""SmolLM2 → Gemma-3 with the W-Matrix that the project fits, on sources that gave no anchor."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from awareness_demo.anchors import held_out_dir
from harness import awareness

from awareness_vllm.anchors.corpus import load
from awareness_vllm.evaluate.monitor import WMatrixMonitor
from awareness_vllm.wmatrix.certificate import TAIL
from awareness_vllm.wmatrix.file import load as load_wmatrix

# The first test waits for the fit (eight minutes on two cores) and for the certificate.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(2400)]

SOURCES = ("crawl", "debian-history", "wordnet")


@pytest.fixture(scope="module")
def texts() -> list[Path]:
    return [held_out_dir() / name for name in SOURCES]


@pytest.fixture(scope="module")
def cases() -> Path:
    return held_out_dir() / "facts" / "cases.jsonl"


@pytest.fixture(scope="module")
def certified(
    wmatrix: Path,
    smollm2: Path,
    gemma3: Path,
    texts: list[Path],
    cases: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("certified") / wmatrix.name
    shutil.copy(wmatrix, path)
    models = ("--source", smollm2, "--target", gemma3)
    run = awareness("certify", path, *models, "--texts", *texts, "--cases", cases, "--limit", 24)
    assert run.status == 0, run.stderr[-2000:]
    print(run.out)
    return path


@pytest.fixture(scope="module")
def certificate(certified: Path) -> dict:
    certificate = load_wmatrix(certified).manifest.certificate
    assert certificate is not None
    return certificate


def test_retention(certificate: dict) -> None:
    """A floor against regressions, below what was measured (README); the bar to reach, 0.95, is not
    reached by the map alone."""
    assert certificate["retention"]["mean"] >= 0.75
    alone, served = (next(p for p in certificate["plans"] if p["tail"] == t) for t in (0, TAIL))
    assert alone["kinds"].keys() == set(SOURCES)
    assert served["cost"] <= 0.25
    assert served["retention"]["mean"] >= 0.85


def test_memory_is_worth_more_than_its_tokens(certificate: dict) -> None:
    nll = {arm: row["nll"] for arm, row in certificate["texts"].items()}
    assert nll["tokens_only"] - nll["memory"] >= 0.2 * (nll["none"] - nll["native"])
    assert certificate["margin"]["ci_low"] > 0
    assert certificate["facts_margin"]["ci_low"] > 0


def test_wrong_memory_is_no_help(certificate: dict) -> None:
    nll = {arm: row["nll"] for arm, row in certificate["texts"].items()}
    # Any English text helps a little over none at all; what is far from it is a leak of the text.
    assert nll["wrong_memory"] >= nll["none"] - 0.15 * (nll["none"] - nll["native"])
    assert certificate["cases"]["wrong_memory"]["exact_match"] <= 0.05


def test_fact_recall(certificate: dict) -> None:
    assert certificate["facts"]["mean"] >= 0.30


def test_eval_measures_the_same_arms(
    wmatrix: Path, smollm2: Path, gemma3: Path, texts: list[Path], cases: Path
) -> None:
    models = ("--source", smollm2, "--target", gemma3, "--limit", 2)
    on_texts = awareness("eval", wmatrix, *models, "--texts", *texts).out
    assert on_texts["n"] == 2
    assert on_texts["conditions"]["native"]["kl"] == 0
    assert set(on_texts["retention"]) == {"mean", "ci_low", "ci_high"}
    on_cases = awareness("eval", wmatrix, *models, "--cases", cases).out
    assert on_cases["n"] == 2
    assert set(on_cases["conditions"]) == set(on_texts["conditions"])


def test_the_monitor_notices_what_does_not_hold(
    certified: Path, smollm2: Path, gemma3: Path, texts: list[Path], tmp_path: Path
) -> None:
    monitor = WMatrixMonitor(load(texts), source=smollm2, target=gemma3, sample=6)
    status = monitor.check(certified)
    assert not status.drift_detected, status
    assert status.accuracy is not None
    wmatrix = load_wmatrix(certified)
    worse = replace(wmatrix, decode=wmatrix.decode * 0.5)
    worse.save(tmp_path / "worse.wmatrix")
    status = monitor.check(tmp_path / "worse.wmatrix")
    assert status.drift_detected, status
    assert "retention" in status.reasons[0]
