"""Published figures: read right, in range, monotone in tokens, never taken for measured ones."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from awareness_vllm.compatibility import priors
from awareness_vllm.compatibility.prior_tables import FILE, tables
from awareness_vllm.compatibility.priors import (
    by_length,
    class_of,
    find_name,
    known_name,
    positional_impact,
    published_architecture,
    published_cells,
    published_error,
    published_geometry,
    published_retention,
    published_route,
    published_shares,
    published_vectors,
    without_loss_by,
)
from awareness_vllm.compatibility.report import Matrix
from awareness_vllm.errors import BadInput
from awareness_vllm.models.rope import SCHEMES

pytestmark = pytest.mark.unit

NAMES = st.sampled_from(tables().models)
CONTENTS = st.none() | st.sampled_from(sorted(tables().content.ranges))
LENGTHS = st.integers(min_value=-5, max_value=10**9) | st.integers(min_value=900, max_value=300_000)


def mean(source: str, target: str, tokens: int, content: str | None = None) -> float:
    found = published_retention(source, target, tokens, content)
    assert found is not None
    return found[0].mean


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("gpt-4", "GPT-4"),
        ("GPT-4", "GPT-4"),
        ("gpt-4o", "GPT-4o"),
        ("claude-3.5", "Claude 3.5"),
        ("claude-3-5-sonnet", "Claude 3.5"),
        ("claude-3-opus", "Claude 3 Opus"),
        ("llama-3.1-70b", "LLaMA 3.1 70B"),
        ("llama-3.1", "LLaMA 3.1 70B"),
        ("mistral-large", "Mistral Large"),
        ("gemini_pro", "Gemini Pro"),
        ("falcon-180b", "Falcon 180B"),
        ("phi-3-medium", "Phi-3 Medium"),
        ("command-r+", "Command R+"),
        ("command-r-plus", "Command R+"),
        ("qwen2-72b", "Qwen 2 72B"),
        ("dbrx", "DBRX"),
    ],
)
def test_names_are_known_however_they_are_spelled(given_name: str, name: str) -> None:
    assert known_name(given_name) == name


def test_a_smaller_model_is_not_taken_for_its_larger_one() -> None:
    # Nothing is published of these.
    for name in ("llama-3.1-8b", "command-r", "gpt-4-turbo", "qwen-2-7b", "falcon", ""):
        assert find_name(name) is None


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(BadInput, match=r"'gtp-4'.*Expected: one of .*GPT-4") as caught:
        known_name("gtp-4")
    assert "DBRX" not in str(caught.value)
    with pytest.raises(BadInput, match="one of my-own-model"):
        known_name("my-own-modle", ["my-own-model"])
    with pytest.raises(BadInput, match=r"Creative context, .*Nuanced analysis"):
        published_retention("gpt-4", "gpt-4o", 1000, "zzz")


@settings(deadline=None)
@given(st.text())
@example("GPT+4")
@example("İ")
def test_any_text_is_a_known_name_or_bad_input(name: str) -> None:
    if find_name(name) is not None:
        assert known_name(name) in tables().models
        return
    with pytest.raises(BadInput) as caught:
        known_name(name)
    assert repr(name) in str(caught.value)


def test_the_tables_are_the_published_ones() -> None:
    t = tables()
    assert t.memory.at("GPT-4", "LLaMA 3.1 70B") == 0.91
    assert t.memory.at("Claude 3.5", "Claude 3 Opus") == 0.97
    assert t.memory.at("Claude 3 Opus", "Claude 3.5") == 0.96
    assert t.memory.at("Gemini Pro", "Mistral Large") == 0.88
    assert t.memory.at("LLaMA 3.1 70B", "Mistral Large") == 0.95
    assert t.vectors.at("GPT-4", "LLaMA 3.1 70B") == 0.85
    assert t.vectors.at("Mistral Large", "LLaMA 3.1 70B") == 0.88
    assert t.vectors.at("GPT-4", "GPT-4") is None
    assert t.partial.ranges["Qwen 2 72B"] == (0.79, 0.86)
    assert t.content.ranges["Creative context"] == (0.85, 0.90)
    assert by_length("different", 128_000) == pytest.approx(0.88)
    shape = published_architecture("gpt-4")
    assert shape is not None
    assert (shape.hidden_size, shape.heads, shape.layers) == (12288, 96, 120)
    assert set(shape.estimated) == {"hidden_size", "heads", "layers"}
    shape = published_architecture("llama-3.1-70b")
    assert shape is not None
    assert (shape.layers, shape.vocabulary, shape.estimated) == (80, 128256, ())
    assert published_architecture("dbrx") is None


def test_every_table_names_its_source() -> None:
    for name, table in json.loads(FILE.read_text()).items():
        assert table["source"].startswith(
            ("cross-model-compatibility.md, ", "w-matrix-alignment.md, ")
        ), name


def test_vectors_keep_less_than_memories_and_lie_in_a_published_tier() -> None:
    t = tables()
    for source in t.memory.models:
        for target in t.memory.models:
            figure = t.vectors.at(source, target)
            assert (figure is None) == (source == target)
            if figure is not None:
                assert figure < (t.memory.at(source, target) or 0)
                assert any(low <= figure <= high for low, high in t.tiers.ranges)


def test_longer_contexts_and_stranger_architectures_keep_less_in_the_table() -> None:
    context = tables().context
    for figures in (context.same, context.similar, context.different):
        assert all(a > b for a, b in pairwise(figures))
    for at in zip(context.same, context.similar, context.different, strict=True):
        assert at[0] > at[1] > at[2]


def test_shares_are_the_whole_and_no_one_can_change_them() -> None:
    shares = published_shares()
    assert list(shares.values()) == [0.30, 0.25, 0.20, 0.15, 0.10]
    assert sum(shares.values()) == pytest.approx(1)
    shares.clear()
    assert len(published_shares()) == 5


def test_each_spelling_is_one_model() -> None:
    t = tables()
    names = [priors.spelling(n) for n in (*t.models, *t.aliases.names)]
    assert len(names) == len(set(names))


def test_rows_columns_and_names_agree() -> None:
    t = tables()
    for pairs in (t.memory, t.vectors):
        assert pairs.rows.keys() == {*pairs.models}
        assert all(len(row) == len(pairs.models) for row in pairs.rows.values())
    for figures in (t.context.same, t.context.similar, t.context.different):
        assert len(figures) == len(t.context.tokens)
    spans = (*t.partial.ranges.values(), *t.content.ranges.values(), *t.tiers.ranges)
    spans = (*spans, *t.tiers.errors, *(row.loss for row in t.positions.rows))
    assert all(low <= high for low, high in spans)
    names = {*t.vectors.models, *t.architectures.models, *t.aliases.names.values()}
    assert names <= {*t.models}


@settings(deadline=None)
@given(NAMES, NAMES, LENGTHS, CONTENTS)
def test_retention_is_a_share_within_its_range(
    source: str, target: str, tokens: int, content: str | None
) -> None:
    found = published_retention(source, target, tokens, content)
    if found is None:
        assert source == target
        return
    interval, basis = found
    assert 0 <= interval.ci_low < interval.mean < interval.ci_high <= 1
    assert basis.kind == "prior"
    assert basis.digest is None
    assert "cross-model-compatibility.md" in basis.source


@settings(deadline=None)
@given(NAMES, NAMES, LENGTHS, LENGTHS, CONTENTS)
def test_a_longer_memory_keeps_no_more(
    source: str, target: str, some: int, more: int, content: str | None
) -> None:
    some, more = sorted((some, more))
    found = [published_retention(source, target, tokens, content) for tokens in (some, more)]
    if found[0] and found[1]:
        for field in ("mean", "ci_low", "ci_high"):
            # To the last bits: interpolating and dividing round.
            assert getattr(found[1][0], field) <= getattr(found[0][0], field) + 1e-12


@settings(deadline=None)
@given(st.integers(min_value=10_000, max_value=50_000))
def test_the_matrix_holds_as_it_is_where_it_is_said_to_hold(tokens: int) -> None:
    assert mean("gpt-4", "llama-3.1-70b", tokens) == 0.91
    assert mean("gpt-4o", "gpt-4", tokens) == 0.96


def test_retention_by_length() -> None:
    # A different architecture: 0.94 … 0.85 in the context table.
    at_10k = by_length("different", 10_000)
    assert 0.91 < at_10k < 0.93
    assert mean("gpt-4", "llama-3.1", 1000) == pytest.approx(0.91 * 0.94 / at_10k)
    at_50k = by_length("different", 50_000)
    assert mean("gpt-4", "llama-3.1", 200_000) == pytest.approx(0.91 * 0.85 / at_50k)
    assert mean("gpt-4", "llama-3.1", 10**9) == mean("gpt-4", "llama-3.1", 200_000)
    assert mean("gpt-4", "llama-3.1", 1) == mean("gpt-4", "llama-3.1", 1000)
    # Half way from 8K to 32K in the logarithm of tokens is half way in retention.
    assert by_length("similar", 16_000) == pytest.approx(0.945)
    # A short memory is not promised more than anybody published.
    assert mean("gpt-4", "gpt-4", 1000) == 0.99


def test_the_range_covers_what_is_published_of_the_pair() -> None:
    found = published_retention("gpt-4", "llama-3.1", 32_000)
    assert found is not None
    assert (found[0].ci_low, found[0].ci_high) == pytest.approx((0.845, 0.985))
    found = published_retention("gpt-4", "llama-3.1", 32_000, "factual knowledge")
    assert found is not None
    assert found[0].mean == pytest.approx((0.91 + 0.965) / 2)
    assert (found[0].ci_low, found[0].ci_high) == pytest.approx((0.905, 0.985))
    # The figures by content are of cross-model transfers.
    same = published_retention("gpt-4", "gpt-4", 32_000)
    assert same == published_retention("gpt-4", "gpt-4", 32_000, "creative context")
    assert same is not None
    assert (same[0].ci_low, same[0].ci_high) == pytest.approx((0.965, 0.995))


def test_partial_support_is_a_range() -> None:
    found = published_retention("falcon-180b", "gpt-4", 32_000)
    assert found is not None
    assert found[0].mean == pytest.approx(0.785)
    assert (found[0].ci_low, found[0].ci_high) == pytest.approx((0.745, 0.825))
    assert found == published_retention("gpt-4", "falcon-180b", 32_000, "creative context")
    both = published_retention("phi-3-medium", "dbrx", 32_000)
    assert both is not None
    assert (both[0].ci_low, both[0].ci_high) == pytest.approx((0.735, 0.815))
    assert published_retention("dbrx", "dbrx", 32_000) is None


def test_vectors_have_the_ranges_of_their_tiers() -> None:
    found = published_vectors("gpt-4", "llama-3.1")
    assert found is not None
    assert found[0].mean == 0.85
    assert (found[0].ci_low, found[0].ci_high) == pytest.approx((0.745, 0.905))
    assert found[1].kind == "prior"
    found = published_vectors("gpt-4", "dbrx")
    assert found is not None
    assert (found[0].ci_low, found[0].mean, found[0].ci_high) == pytest.approx(
        (0.735, 0.775, 0.815)
    )
    assert published_vectors("gpt-4", "gpt-4") is None


@pytest.mark.parametrize(
    ("figure", "expected"),
    [(0.99, "same"), (0.97, "same"), (0.96, "similar"), (0.94, "similar"), (0.93, "different")],
)
def test_the_class_is_what_the_figure_reaches(figure: float, expected: str) -> None:
    assert class_of(figure) == expected


@pytest.mark.parametrize(
    ("schemes", "windowed", "expected"),
    [
        (("rope", "rope"), False, (0.0, 0.01)),
        (("llama3", "yarn"), False, (0.0, 0.01)),
        (("rope", "longrope"), True, (0.01, 0.02)),
        (("learned", "rope"), False, (0.01, 0.03)),
        (("linear", "learned"), False, (0.01, 0.03)),
        (("alibi", "dynamic"), False, (0.03, 0.05)),
        (("rope", "alibi"), False, None),
        (("none", "rope"), False, None),
        (("learned", "rope"), True, None),
    ],
)
def test_positional_impact(
    schemes: tuple[str, str], windowed: bool, expected: tuple[float, float] | None
) -> None:
    assert positional_impact(*schemes, windowed) == expected


def test_a_share_of_the_loss_is_taken_off() -> None:
    assert without_loss_by("Head Redistribution Error", 0.9) == pytest.approx(0.975)
    assert without_loss_by("Positional Re-encoding Drift", 1.2) == 1
    assert without_loss_by("Positional Re-encoding Drift", -0.5) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("retention", "error"),
    [(0.99, 0.01), (0.93, 0.01), (0.90, 0.025), (0.86, 0.035), (0.7, 0.15), (0.5, None)],
)
def test_the_error_is_that_of_the_retentions_tiers(retention: float, error: float | None) -> None:
    assert published_error(retention) == (error if error is None else pytest.approx(error))


def test_an_architecture_is_a_cache_with_as_many_kv_heads_as_heads() -> None:
    shape = published_geometry("gpt-4")
    assert shape is not None
    assert (len(shape.layers), shape.layers[0].heads, shape.layers[0].head_dim) == (120, 96, 128)
    assert shape.layers[0].positions.scheme == "learned"
    assert not shape.weights
    assert published_geometry("gemini-pro") is None


def test_the_published_route_is_never_worse_than_the_direct_one() -> None:
    models = tables().models
    for source in models:
        for target in set(models) - {source}:
            route, best, direct = published_route(source, target, 32_000)
            assert (route[0], route[-1]) == (source, target)
            assert best >= direct == mean(source, target, 32_000)
            assert (len(route) == 2) == (best == direct)


def test_every_scheme_of_geometries_is_rotary_or_known_by_its_name() -> None:
    assert set(SCHEMES) == priors.ROTARY | {"none", "alibi", "learned"}


def test_the_cells_are_the_matrix() -> None:
    cells = published_cells()
    models = tables().models
    matrix = Matrix(sources=models, targets=models, cells=tuple(cells))
    assert len(cells) == 12 * 12 - 5
    cell = matrix.cell("GPT-4", "LLaMA 3.1 70B")
    assert cell is not None
    assert cell.retention is not None
    assert cell.basis is not None
    assert cell.retention.mean == 0.91
    assert cell.basis.kind == "prior"
    assert "Full Compatibility Matrix" in cell.basis.source
    for cell in cells:
        printed = tables().memory.at(cell.source, cell.target)
        assert cell.retention is not None
        assert printed in (None, cell.retention.mean)
