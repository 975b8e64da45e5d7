"""One memory's retention from a certificate of others, and measured on the memory's own end."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.compatibility.estimate import predict, quantile
from awareness_vllm.compatibility.self_test import measure, of_further_text, sums
from awareness_vllm.errors import BadInput
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.packages.capture import capture, read_tokens
from awareness_vllm.packages.file import Package, beginning
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan, Protocol

pytestmark = pytest.mark.unit

KEPT = {(300, 0): 0.9, (300, 48): 0.95, (1000, 0): 0.8, (1000, 48): 0.9}
TEXTS = 24


def interval(mean: float, half: float = 0.02) -> Interval:
    return Interval(mean=mean, ci_low=mean - half, ci_high=mean + half)


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    plans = tuple(
        Plan(
            context=context,
            tail=tail,
            cost=0.1,
            retention=interval(kept),
            kinds={"poems": interval(kept - 0.05, 0.04)},
            top1=kept,
            tokens_only=interval(0),
        )
        for (context, tail), kept in KEPT.items()
    )
    known = interval(0.9)
    return Certificate(
        protocol=Protocol(texts="", cases="", limit=TEXTS, context=300, continuation=60),
        texts={},
        cases={},
        metrics=None,
        retention=known,
        margin=known,
        plans=plans,
        facts=known,
        facts_kinds={},
        facts_distances={},
        facts_margin=known,
        counts={"texts": TEXTS},
        tier=None,
        measured=date(2026, 11, 23),
        hardware="",
        versions={},
    )


@pytest.mark.parametrize(("context", "tail"), KEPT)
def test_a_measured_point_is_what_was_measured(
    certificate: Certificate, context: int, tail: int
) -> None:
    assert predict(certificate, context, tail).mean == pytest.approx(KEPT[context, tail])


def test_between_points_it_is_in_between(certificate: Certificate) -> None:
    assert predict(certificate, 300, 24).mean == pytest.approx(0.925)
    middle = round(math.sqrt(300 * 1000))
    assert predict(certificate, middle, 0).mean == pytest.approx(0.85, abs=1e-3)
    assert predict(certificate, middle, 24).mean == pytest.approx(0.8875, abs=1e-3)


def test_beyond_the_points_nothing_is_promised(certificate: Certificate) -> None:
    assert predict(certificate, 10, 0) == predict(certificate, 300, 0)
    assert predict(certificate, 300, 999) == predict(certificate, 300, 48)
    longest, beyond = predict(certificate, 1000, 0), predict(certificate, 3000, 0)
    # As steep as from 300 to 1000, in the logarithm.
    fall = 0.1 * math.log(3) / math.log(10 / 3)
    assert beyond.mean == pytest.approx(0.8 - fall)
    assert beyond.ci_high == longest.ci_high
    assert beyond.ci_low == pytest.approx(longest.ci_low - 2 * fall)


def test_a_longer_tail_than_measured_loses_nothing(certificate: Certificate) -> None:
    # By chance, 48 tokens were measured to keep less than none.
    plans = [p for p in certificate.plans if p.context == 300]
    turned = [
        a.model_copy(update={"tail": b.tail}) for a, b in zip(plans, plans[::-1], strict=True)
    ]
    unlucky = certificate.model_copy(update={"plans": tuple(turned)})
    assert predict(unlucky, 300, 99) == predict(unlucky, 300, 48)


def test_a_known_kind_moves_the_mean_and_keeps_the_spread(certificate: Certificate) -> None:
    anything, poems = predict(certificate, 300, 0), predict(certificate, 300, 0, "poems")
    assert poems.mean == pytest.approx(anything.mean - 0.05)
    assert poems.ci_high - poems.ci_low == pytest.approx(anything.ci_high - anything.ci_low)
    assert predict(certificate, 300, 0, "letters") == anything


def test_the_interval_holds_one_further_document(certificate: Certificate) -> None:
    # Documents that spread so much give such an interval of their mean.
    spread, rng = 0.02 / 1.96 * math.sqrt(TEXTS), np.random.default_rng(0)
    found = predict(certificate, 300, 0)
    drawn = rng.normal(0.9, spread, 100_000)
    assert 0.95 < np.mean((found.ci_low < drawn) & (drawn < found.ci_high)) < 0.975


@given(context=st.integers(1, 10**7), tail=st.integers(0, 10**4))
def test_every_estimate_lies_in_its_interval(
    certificate: Certificate, context: int, tail: int
) -> None:
    found = predict(certificate, context, tail)
    assert found.ci_low <= found.mean <= found.ci_high
    assert 0 <= found.mean <= 0.95
    assert found.mean >= predict(certificate, context + 1, tail).mean - 1e-12


def test_another_stretch_is_subject_to_chance_as_well() -> None:
    found = of_further_text({"mean": 0.8, "ci_low": 0.7, "ci_high": 1.0})
    assert (found.mean, found.ci_low) == (0.8, pytest.approx(0.8 - 0.1 * math.sqrt(2)))
    assert found.ci_high == pytest.approx(0.8 + 0.2 * math.sqrt(2))


def test_kinds_that_differ_more_than_by_chance_widen_the_interval_of_others(
    certificate: Certificate,
) -> None:
    def kinds(*means: float, half: float = 0.001) -> Certificate:
        named = {str(i): interval(mean, half) for i, mean in enumerate(means)}
        plans = (plan.model_copy(update={"kinds": named}) for plan in certificate.plans)
        return certificate.model_copy(update={"plans": tuple(plans)})

    def width(found: Certificate, kind: str | None = None) -> float:
        said = predict(found, 300, 0, kind)
        return said.ci_high - said.ci_low

    alike, apart, by_chance = kinds(0.9, 0.9), kinds(0.8, 1.0), kinds(0.8, 1.0, half=0.3)
    assert width(alike) == width(by_chance) < width(apart)
    assert width(apart, "0") == width(alike)


@pytest.mark.parametrize(("freedom", "t"), [(15, 2.131), (23, 2.069), (47, 2.012), (1000, 1.962)])
def test_few_documents_make_wider_intervals(freedom: int, t: float) -> None:
    assert quantile(freedom) == pytest.approx(t, rel=0.01)


def test_stretches_add_neighbours() -> None:
    assert sums(np.ones(40)).tolist() == [16, 16, 8]


def test_a_beginning_is_the_memory_of_fewer_tokens(make_package: Callable[..., Package]) -> None:
    package = make_package("hello wörld")
    first = beginning(package, 5)
    assert (first.text, first.tokens) == ("hello", package.tokens[:5])
    assert all(torch.equal(a, b[:5]) for a, b in zip(first.keys, package.keys, strict=True))
    assert all(torch.equal(a, b[:5]) for a, b in zip(first.values, package.values, strict=True))
    assert first.manifest.tokens == 5
    assert beginning(first, 5).manifest == first.manifest
    # Token 8 ends within the two bytes of ö.
    assert beginning(package, 8).text == "hello w"
    assert beginning(package, 0).text == ""


TEXT = "The quick brown fox jumps over the lazy dog, and the other dogs look on. " * 8


def test_a_models_own_memory_keeps_all_of_itself(tiny_models: tuple[Path, Path]) -> None:
    folder, _ = tiny_models
    package = capture(folder, TEXT)
    found = measure(package, None, folder, other=capture(folder, TEXT[::-1]))
    assert found.retention.mean == pytest.approx(1, abs=0.01)
    assert set(found.conditions) == {"native", "memory", "none", "wrong_memory"}
    assert found.conditions["wrong_memory"] != pytest.approx(found.conditions["native"], abs=1e-4)
    tokens = len(read_tokens(folder, TEXT).ids)
    assert found.scored == pytest.approx(tokens / 4, abs=2)
    # A memory that is another text's states keeps something else.
    model = load_model(folder)
    keys, values = states(model, package.tokens[::-1])
    forged = Package(package.manifest, package.text, package.tokens, package.spans, keys, values)
    assert measure(forged, None, folder).retention.mean != pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("text", ["too short", TEXT])
def test_what_cannot_be_measured_on_itself_says_why(
    tiny_models: tuple[Path, Path], text: str
) -> None:
    from awareness_vllm.packages.file import without_text

    package = capture(tiny_models[0], text)
    with pytest.raises(BadInput, match="cannot be measured on itself"):
        measure(without_text(package) if text is TEXT else package, None, tiny_models[0])
