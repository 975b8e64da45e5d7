"""Figures that no measurement gives: a certificate with one is refused, not believed."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_certificate import METRICS, PLANS, PROTOCOL, cases, texts

from awareness_vllm.errors import BadInput, WMatrixCorrupt
from awareness_vllm.evaluate.certify import build_certificate, plausible
from awareness_vllm.wmatrix.certificate import parse_certificate
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_manifest
from awareness_vllm.wmatrix.plans import plans_for, with_tail

pytestmark = pytest.mark.unit

Document = dict[str, Any]


def genuine() -> Document:
    certificate = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS)
    return certificate.model_dump(mode="json")


def edited(*path: str | int, value: Any) -> Document:
    document: Any = copy.deepcopy(genuine())
    part = document
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return document


def with_margin(margin: float, control: str = "quotes") -> Document:
    """A plan that keeps 0.1 more than a control, and claims `margin`."""
    document = genuine()
    plan, mean = document["plans"][0], document["plans"][0]["retention"]["mean"]
    plan["controls"] = {control: interval(mean - 0.1)}
    plan["margin"] = interval(margin)
    return document


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1}


FORGED: dict[str, Callable[[], Document]] = {
    "a mean of 42": lambda: edited("retention", "mean", value=42),
    "a plan's mean of 42": lambda: edited("plans", 0, "retention", "mean", value=42),
    "recall of 42": lambda: edited("facts", "mean", value=42),
    "far below zero": lambda: edited("retention", "ci_low", value=-1e300),
    "an interval backwards": lambda: edited("retention", "ci_low", value=2),
    "no plan": lambda: edited("plans", value=[]),
    "no plan without a tail": lambda: edited("plans", value=genuine()["plans"][1:2]),
    "a context of nothing": lambda: edited("plans", 0, "context", value=0),
    "a negative tail": lambda: edited("plans", 0, "tail", value=-1),
    "a negative cost": lambda: edited("plans", 0, "cost", value=-1),
    "top-1 above one": lambda: edited("plans", 0, "top1", value=1.5),
    "counts of nothing": lambda: edited("counts", value={}),
    "counts of no text": lambda: edited("counts", value={"texts": 0, "cases": 3}),
    "a margin without controls": lambda: edited("plans", 0, "margin", value=genuine()["facts"]),
    "a margin that its controls contradict": lambda: with_margin(0.9),
    "a control of another name": lambda: with_margin(0.1, "a guess"),
    "facts that native recalls thrice": lambda: edited("plans", 0, "facts_native", value=3),
    "a kind's exact matches above all": lambda: edited(
        "plans", 0, "facts_kinds", value={"sum": {"memory": 1.5}}
    ),
    "tier 0": lambda: edited("tier", value=0),
    "metrics of no layer": lambda: edited("metrics", "semantic_preservation", value=[]),
    "a cosine of 7": lambda: edited("metrics", "semantic_preservation", value=[7.0]),
    "a kind with an escape": lambda: edited("facts_kinds", value={"\x1b[31m": genuine()["facts"]}),
    "hardware of two lines": lambda: edited("hardware", value="a\nb"),
}


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
def test_a_file_with_a_forged_figure_is_refused(
    forged: Callable[[], Document], wmatrix: WMatrix, tmp_path: Path
) -> None:
    manifest = wmatrix.manifest.model_copy(update={"certificate": forged()})
    replace(wmatrix, manifest=manifest).save(tmp_path / "a.wmatrix")
    for read in (load, read_manifest):
        with pytest.raises(WMatrixCorrupt, match="certificate") as caught:
            read(tmp_path / "a.wmatrix")
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "path", [("retention", "mean"), ("margin", "ci_high"), ("plans", 0, "cost")]
)
def test_figures_are_finite(path: tuple[str | int, ...], value: float) -> None:
    with pytest.raises(ValueError, match=str(path[0])):
        parse_certificate(edited(*path, value=value))


def test_what_was_measured_is_believed_and_what_is_incomplete_certifies_nothing() -> None:
    document = genuine()
    assert parse_certificate(document) is not None
    assert parse_certificate(json.loads(json.dumps(document))) is not None
    assert parse_certificate(None) is None
    assert parse_certificate({}) is None
    for name in document:
        assert parse_certificate({k: v for k, v in document.items() if k != name}) is None
    assert parse_certificate(with_margin(0.1)) is not None
    # A later version's.
    assert parse_certificate(document | {"energy": 1}) is None


@pytest.mark.parametrize("context", [1, 300, 301, 10**9])
@pytest.mark.parametrize("tail", [0, 1, 10**9])
def test_every_certificate_has_a_plan_for_every_length_and_tail(context: int, tail: int) -> None:
    certificate = parse_certificate(genuine())
    assert certificate is not None
    assert plans_for(certificate, context)
    assert with_tail(certificate, context, tail).tail <= tail


def test_measuring_what_is_not_plausible_is_bad_input() -> None:
    """As where the target gains almost nothing by reading: the share of that says nothing."""
    with pytest.raises(BadInput, match="retention"), plausible():
        build_certificate(PROTOCOL, texts(2.0), cases(), METRICS, PLANS)
