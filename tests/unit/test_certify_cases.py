"""How cases are taken, and how a certificate's plans are printed: with margins, or none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_certificate import METRICS, PLANS, PROTOCOL, cases, texts

from awareness_vllm.cli.format import lines
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.certify import build_certificate, by_length
from awareness_vllm.evaluate.evaluate import last_words, other_case
from awareness_vllm.wmatrix.certificate import Interval, parse_certificate
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.plans import cheapest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("tokens", "lengths", "length"),
    [(290, (300, 1000), 300), (1400, (300, 1000), 1000), (None, (300, 1000), 300)],
)
def test_cases_count_for_the_length_that_they_are_nearest_to(
    tokens: int | None, lengths: tuple[int, ...], length: int
) -> None:
    case = {"context": "c"} | ({} if tokens is None else {"tokens": tokens})
    assert by_length([case], lengths, 300)[length] == [case]


def test_cases_far_from_all_lengths_count_for_none() -> None:
    assert by_length([{"tokens": 4000}, {"tokens": 100}], (300, 1000), 300) == {300: []}


def test_an_old_certificate_claims_no_margin() -> None:
    document = build_certificate(PROTOCOL, texts(), cases(), METRICS, PLANS).model_dump(mode="json")
    added = {"reread", "controls", "margin", "facts_native", "facts_controls", "facts_margin"}
    added |= {"facts_kinds", "texts", "cases"}
    plans = [{k: v for k, v in plan.items() if k not in added} for plan in document["plans"]]
    old = parse_certificate(document | {"plans": plans})
    assert old is not None
    assert {(plan.margin, plan.beaten, plan.reread) for plan in old.plans} == {(None, False, 0)}
    assert cheapest(old, 0.9).tail == 0
    assert "no controls measured" in "\n".join(lines(document | {"plans": plans}))


def test_lines_name_controls_and_margins() -> None:
    interval = Interval(mean=-0.1, ci_low=-0.2, ci_high=0)
    plan = PLANS[3].model_copy(
        update={
            "controls": {"quotes": Interval(mean=1, ci_low=0, ci_high=1)},
            "margin": interval,
            "reread": 24,
            "facts_kinds": {"sum": {"native": 0.5, "memory": 0.25}},
        }
    )
    certificate = build_certificate(PROTOCOL, texts(), cases(), METRICS, [PLANS[3], plan])
    text = "\n".join(lines(certificate.model_dump(mode="json")))
    assert "300 tokens, 0 + 24" in text
    assert "quotes" in text
    assert "never chosen" in text
    assert "native 0.50  memory 0.25" in text


@pytest.mark.parametrize("margin", [-0.1, 0.25])
def test_a_maps_standing_has_the_margin_as_served(wmatrix: WMatrix, margin: float) -> None:
    mean = PLANS[3].retention.mean
    controls = {"quotes": Interval(mean=mean - margin, ci_low=-1, ci_high=2)}
    over = Interval(mean=margin, ci_low=-1, ci_high=1)
    served = PLANS[3].model_copy(update={"tail": 16, "controls": controls, "margin": over})
    plans = [PLANS[3], served]
    document = build_certificate(PROTOCOL, texts(), cases(), METRICS, plans).model_dump(mode="json")
    manifest = wmatrix.manifest.model_copy(update={"certificate": document})
    assert manifest.standing.endswith(f"of native, margin as served {margin:+.3f}")


@given(st.text("ab \n", max_size=80), st.integers(1, 5))
def test_the_last_words_are_the_texts_end(text: str, count: int) -> None:
    words = last_words(text, count)
    assert text.endswith(words)
    assert words.split() == text.split()[-count:]


def test_all_cases_of_one_context_have_no_wrong_memory() -> None:
    one, other = {"context": "a"}, {"context": "b"}
    assert other_case([one, one, other], 0) is other
    assert other_case([one, other, other], 2) is one
    with pytest.raises(BadInput, match="one context"):
        other_case([one, one], 1)
