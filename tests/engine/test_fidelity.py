"""SmolLM2 → Gemma-3 with the W-Matrix that the project fits, on sources that gave no anchor."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import awareness

from awareness_vllm.anchors.install import held_out_dir

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def arms(wmatrix: Path, smollm2: Path, gemma3: Path) -> dict:
    texts = [held_out_dir() / name for name in ("crawl", "debian-history", "wordnet")]
    run = awareness(
        "eval", wmatrix, "--source", smollm2, "--target", gemma3, "--texts", *texts, "--limit", 24
    )
    assert run.status == 0, run.stderr[-2000:]
    print(run.out)
    return run.out


@pytest.fixture(scope="module")
def recall(wmatrix: Path, smollm2: Path, gemma3: Path) -> dict:
    cases = held_out_dir() / "facts" / "cases.jsonl"
    run = awareness(
        "eval", wmatrix, "--source", smollm2, "--target", gemma3, "--cases", cases, "--limit", 48
    )
    assert run.status == 0, run.stderr[-2000:]
    print(run.out)
    return run.out


def test_retention(arms: dict) -> None:
    """A floor against regressions, below what was measured (README); the bar to reach is 0.90."""
    assert arms["retention"]["mean"] >= 0.75


def test_memory_is_worth_more_than_its_tokens(arms: dict, recall: dict) -> None:
    nll = {arm: row["nll"] for arm, row in arms["arms"].items()}
    span = nll["none"] - nll["native"]
    assert nll["tokens_only"] - nll["memory"] >= 0.2 * span
    exact = {arm: row["exact_match"] for arm, row in recall["arms"].items()}
    assert exact["memory"] - exact["tokens_only"] >= 0.1


def test_wrong_memory_is_no_help(arms: dict, recall: dict) -> None:
    nll = {arm: row["nll"] for arm, row in arms["arms"].items()}
    # Any English text helps a little over none at all; what is far from it is a leak of the text.
    assert nll["wrong_memory"] >= nll["none"] - 0.15 * (nll["none"] - nll["native"])
    assert recall["arms"]["wrong_memory"]["exact_match"] <= 0.05


def test_fact_recall(recall: dict) -> None:
    exact = {arm: row["exact_match"] for arm, row in recall["arms"].items()}
    assert exact["memory"] >= 0.30 * exact["native"]
