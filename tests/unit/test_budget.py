"""What goes into a budget of time, and that every phase keeps to its end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from awareness_vllm.aligners.on_demand import deadlines_of, extent_of
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.cli.align_on_demand import seconds
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import LEAST, chunks
from awareness_vllm.fit import calibrate, gather
from awareness_vllm.fit.budget import (
    LEAST_JUDGED,
    LEAST_STEPS,
    MOST_JUDGED,
    MOST_TOKENS,
    Plan,
    Speeds,
    least_seconds,
    plan_fit,
)
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import Deadlines, FitConfig
from awareness_vllm.fit.fit import fit

pytestmark = pytest.mark.unit

FEATURES = 8000
SPEEDS = Speeds(
    row=0.002,
    weighing=20.0,
    solving=15.0,
    step=1.5,
    scoring=8.0,
    loading=5.0,
    text=5.0,
    probe=40.0,
)
SMALL = FitConfig(tokens=3000, rank=6, predecessors=1, calibration=6, held_out=0.3)


@pytest.mark.parametrize("minutes", [5, 8, 15, 30, 300])
def test_a_plan_fills_its_budget_and_no_more(minutes: float) -> None:
    plan = plan_fit(SPEEDS, 60 * minutes, FEATURES, FEATURES)
    spent = sum(plan.phases.values())
    assert spent <= 60 * minutes
    # What is left open is the reserve of what follows the calibration, and less than a step.
    assert spent >= 60 * minutes - 0.2 * (SPEEDS.scoring + SPEEDS.judging(plan.judged)) - 2
    assert FEATURES <= plan.tokens <= MOST_TOKENS
    assert plan.steps >= LEAST_STEPS
    assert LEAST_JUDGED <= plan.judged <= MOST_JUDGED


def test_a_larger_budget_buys_more_of_everything() -> None:
    plans = [plan_fit(SPEEDS, 60 * minutes, FEATURES, FEATURES) for minutes in (5, 15, 60)]
    for name in ("tokens", "steps", "judged"):
        counts = [getattr(plan, name) for plan in plans]
        assert counts == sorted(counts), name
        assert counts[0] < counts[-1], name


def test_too_small_a_budget_is_refused_with_the_least_one() -> None:
    least = least_seconds(SPEEDS, FEATURES)
    with pytest.raises(BadInput, match=rf"at least {int(least) // 60}:\d\d"):
        plan_fit(SPEEDS, least - 1, FEATURES, FEATURES)
    assert plan_fit(SPEEDS, least, FEATURES, FEATURES).tokens == FEATURES
    slower = replace(SPEEDS, step=60.0)
    with pytest.raises(BadInput, match="too small"):
        plan_fit(slower, least, FEATURES, FEATURES)


def test_what_follows_the_calibration_has_its_time() -> None:
    plan, ends = plan_fit(SPEEDS, 900, FEATURES, FEATURES), time.monotonic() + 860
    deadlines = deadlines_of(plan, ends)
    assert deadlines.anchors is not None
    assert deadlines.calibration is not None
    kept = ends - deadlines.calibration
    assert kept >= SPEEDS.scoring + SPEEDS.judging(plan.judged)
    solved = deadlines.calibration - deadlines.anchors
    assert solved >= SPEEDS.weighing + SPEEDS.solving + 0.4 * plan.steps * SPEEDS.step
    extent = extent_of(plan, time.monotonic() + SPEEDS.judging(plan.judged))
    assert extent.texts is not None
    assert extent.cases is not None
    begins = time.monotonic() + SPEEDS.loading
    assert extent.texts - begins >= (plan.judged - 2) * SPEEDS.text - 1
    assert extent.cases - extent.texts >= (plan.judged - 2) * SPEEDS.case - 1


def test_a_plan_is_the_same_from_its_file() -> None:
    plan = plan_fit(SPEEDS, 900, FEATURES, FEATURES)
    assert Plan.restored(plan.as_json()) == plan
    with pytest.raises((KeyError, TypeError)):
        Plan.restored({"tokens": 1})


@pytest.mark.parametrize(
    ("text", "expected"), [("15m", 900), ("90s", 90), ("1.5h", 5400), ("45", 45)]
)
def test_budgets_have_units(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "0m", "-5m", "5 parsecs", "1e9999", "nan", "m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a time"):
        seconds(text)


def test_an_evaluation_ends_by_the_clock_with_items_from_everywhere() -> None:
    harness = cast(EvalHarness, SimpleNamespace(device="cpu"))
    items: list[int] = list(range(100))

    def taken(until: float | None) -> list[int]:
        parts: Any = chunks(harness, items, 300, progress=False, until=until)
        return [item for part in parts for item in part]

    assert taken(None) == items
    assert sorted(taken(time.monotonic() + 60)) == items
    few = taken(time.monotonic() - 1)
    assert len(few) == LEAST
    assert max(few) > 50
    assert min(few) < 50


class Ended(Exception):
    """What a test raises once it has seen enough steps."""


@pytest.mark.slow
def test_a_fit_keeps_to_its_deadlines(
    tiny_models: tuple[Path, Path], anchors: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    original = calibrate.kl_divergence

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > 2 * SMALL.calibration:
            raise Ended
        return original(*args)

    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    monkeypatch.setattr(calibrate, "kl_divergence", counted)
    past = Deadlines(anchors=time.monotonic(), calibration=time.monotonic())
    least = fit(*tiny_models, anchors, SMALL, progress=False, deadlines=past)
    assert 256 <= least.manifest.anchors.tokens < SMALL.tokens / 2
    assert steps == 0
    # With time, anchors are read to their count, and the texts gone through again and again.
    ahead, maps = Deadlines(calibration=time.monotonic() + 3600), []
    with pytest.raises(Ended):
        fit(*tiny_models, anchors, SMALL, progress=False, deadlines=ahead, snapshot=maps.append)
    assert maps[0].manifest.anchors.tokens >= SMALL.tokens


def test_a_calibration_that_was_killed_goes_on_with_the_rest_of_the_time(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "work", "key")
    ends = time.monotonic() + 90
    fresh = calibrate.until_a_time(SMALL, checkpoint, ends)
    assert fresh.minutes == pytest.approx(1.5, abs=0.1)
    checkpoint.save("calibration", {"x": torch.ones(1)}, {"seconds": 30.0})
    resumed = calibrate.until_a_time(SMALL, checkpoint, ends)
    assert resumed.minutes == pytest.approx(2.0, abs=0.1)
    over = calibrate.until_a_time(SMALL, Checkpoint(tmp_path / "other", "key"), ends - 1000)
    assert over.minutes == 0.0
    begun = cast(calibrate.Training, SimpleNamespace(step=0, seconds=0.0))
    assert calibrate.progress_share(begun, 0, over.minutes) == 1.0
