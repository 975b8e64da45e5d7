"""SmolLM2 → Gemma-3, certified on sources that gave no anchor.

What is certain holds for a small fit; how much the default fit keeps is for `make nightly`. The
shipped map must be what its own certificate says.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from awareness_demo.anchors import held_out_dir
from awareness_demo.wmatrices import shipped
from harness import awareness

from awareness_vllm.anchors.corpus import load
from awareness_vllm.evaluate.monitor import WMatrixMonitor
from awareness_vllm.wmatrix.certificate import TAIL
from awareness_vllm.wmatrix.file import load as load_wmatrix

# The first test waits for the fit (of the default, ten minutes on two cores) and the certificate.
pytestmark = [pytest.mark.engine, pytest.mark.beside, pytest.mark.timeout(3600)]

SOURCES = ("crawl", "debian-history", "wordnet")
LIMITS = {"small_wmatrix": 6, "full_wmatrix": 24}
"""Texts, and cases, that each fit is certified on."""
FITS = ["small_wmatrix", pytest.param("full_wmatrix", marks=pytest.mark.nightly)]


@pytest.fixture(scope="module")
def texts() -> list[Path]:
    return [held_out_dir() / name for name in SOURCES]


@pytest.fixture(scope="module")
def cases() -> Path:
    return held_out_dir() / "facts" / "cases.jsonl"


@pytest.fixture(scope="module")
def certified(
    request: pytest.FixtureRequest,
    smollm2: Path,
    gemma3: Path,
    texts: list[Path],
    cases: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """A function from a fit's name to its file, certified once."""

    @functools.cache
    def certify(fit: str) -> Path:
        wmatrix = request.getfixturevalue(fit)
        path = tmp_path_factory.mktemp("certified") / wmatrix.name
        shutil.copy(wmatrix, path)
        models = ("--source", smollm2, "--target", gemma3, "--limit", LIMITS[fit])
        run = awareness("certify", path, *models, "--texts", *texts, "--cases", cases)
        assert run.status == 0, run.stderr[-2000:]
        print(run.out)
        return path

    return certify


def certificate_of(path: Path) -> dict:
    certificate = load_wmatrix(path).manifest.certificate
    assert certificate is not None
    return certificate


@pytest.mark.parametrize("fit", FITS)
def test_the_certificate_is_whole(certified: Callable[[str], Path], fit: str) -> None:
    certificate = certificate_of(certified(fit))
    assert certificate["counts"] == {"texts": LIMITS[fit], "cases": LIMITS[fit]}
    assert {0, TAIL} < {plan["tail"] for plan in certificate["plans"]}
    alone = next(plan for plan in certificate["plans"] if plan["tail"] == 0)
    assert alone["kinds"].keys() == set(SOURCES)
    assert certificate["metrics"]["n"] > 0
    assert certificate["texts"]["native"]["kl"] == 0


@pytest.mark.parametrize("fit", FITS)
def test_memory_is_worth_more_than_its_tokens(certified: Callable[[str], Path], fit: str) -> None:
    certificate = certificate_of(certified(fit))
    nll = {arm: row["nll"] for arm, row in certificate["texts"].items()}
    assert nll["tokens_only"] - nll["memory"] >= 0.2 * (nll["none"] - nll["native"])
    assert certificate["margin"]["ci_low"] > 0


@pytest.mark.parametrize("fit", FITS)
def test_wrong_memory_is_no_help(certified: Callable[[str], Path], fit: str) -> None:
    certificate = certificate_of(certified(fit))
    nll = {arm: row["nll"] for arm, row in certificate["texts"].items()}
    # Any English text helps a little over none at all; what is far from it is a leak of the text.
    assert nll["wrong_memory"] >= nll["none"] - 0.15 * (nll["none"] - nll["native"])
    assert certificate["cases"]["wrong_memory"]["exact_match"] <= 0.05


@pytest.mark.nightly
def test_the_default_fit_keeps_as_much_as_ever(certified: Callable[[str], Path]) -> None:
    """Floors against regressions, below what was measured (README); the bar to reach, 0.95, is not
    reached by the map alone."""
    certificate = certificate_of(certified("full_wmatrix"))
    assert certificate["retention"]["mean"] >= 0.75
    assert certificate["facts"]["mean"] >= 0.30
    assert certificate["facts_margin"]["ci_low"] > 0
    served = next(plan for plan in certificate["plans"] if plan["tail"] == TAIL)
    assert served["cost"] <= 0.25
    assert served["retention"]["mean"] >= 0.85


def test_eval_measures_the_same_arms(
    wmatrix: Path, smollm2: Path, gemma3: Path, texts: list[Path], cases: Path
) -> None:
    models = ("--source", smollm2, "--target", gemma3, "--limit", 2)
    with ThreadPoolExecutor() as pool:  # half of the time both only load
        runs = [
            pool.submit(awareness, "eval", wmatrix, *models, *what)
            for what in (("--texts", *texts), ("--cases", cases))
        ]
        on_texts, on_cases = (run.result().out for run in runs)
    assert on_texts["n"] == 2
    assert on_texts["conditions"]["native"]["kl"] == 0
    assert set(on_texts["retention"]) == {"mean", "ci_low", "ci_high"}
    assert on_cases["n"] == 2
    assert set(on_cases["conditions"]) == set(on_texts["conditions"])


def test_the_shipped_map_is_what_its_certificate_says(
    smollm2: Path, gemma3: Path, texts: list[Path]
) -> None:
    path = shipped(smollm2, gemma3)
    if path is None:
        pytest.skip("no map is shipped for these models")
    monitor = WMatrixMonitor(load(texts), source=smollm2, target=gemma3, sample=12)
    status = monitor.check(path)
    assert not status.drift_detected, status


def test_the_monitor_notices_what_does_not_hold(
    certified: Callable[[str], Path],
    smollm2: Path,
    gemma3: Path,
    texts: list[Path],
    tmp_path: Path,
) -> None:
    path = certified("small_wmatrix")
    sample = LIMITS["small_wmatrix"]
    monitor = WMatrixMonitor(load(texts), source=smollm2, target=gemma3, sample=sample)
    status = monitor.check(path)
    assert not status.drift_detected, status
    assert status.accuracy is not None
    wmatrix = load_wmatrix(path)
    worse = replace(wmatrix, decode=wmatrix.decode * 0.5)
    worse.save(tmp_path / "worse.wmatrix")
    status = monitor.check(tmp_path / "worse.wmatrix")
    assert status.drift_detected, status
    assert "retention" in status.reasons[0]
