"""`CompatibilityChecker`: certificates first, published figures as what they are, else nothing."""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import awareness_vllm
from awareness_vllm.compatibility.mismatch import structural_mismatch
from awareness_vllm.compatibility.pair_checker import CompatibilityChecker
from awareness_vllm.compatibility.prior_tables import tables
from awareness_vllm.errors import BadInput
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Metrics, Plan, Protocol
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit

MakeChecker = Callable[..., CompatibilityChecker]


def certificate(kept: float, tier: int | None = 2, metrics: bool = True) -> Certificate:
    interval = Interval(mean=kept, ci_low=kept - 0.03, ci_high=kept + 0.03)
    facts = Interval(mean=0.58, ci_low=0.4, ci_high=0.7)
    plan = Plan(
        context=300, tail=0, cost=0.2, retention=interval, kinds={}, top1=0.5, tokens_only=interval
    )
    return Certificate(
        protocol=Protocol(texts="", cases="", limit=1, context=300, continuation=60),
        texts={},
        cases={},
        metrics=Metrics(
            semantic_preservation=(0.9, 0.8),
            attention_fidelity=(0.7, 0.7),
            gradient_ratio=1,
            gradient_stability=True,
            n=1,
        )
        if metrics
        else None,
        retention=interval,
        margin=interval,
        plans=(plan,),
        facts=facts,
        facts_kinds={},
        facts_distances={},
        facts_margin=facts,
        counts={"texts": 48},
        tier=tier,
        measured=datetime.date(2026, 1, 1),
        hardware="",
        versions={},
    )


@pytest.fixture(scope="session")
def over(wmatrix: WMatrix, geometry: Geometry) -> MakeChecker:
    """A checker over maps given as (source, target, certificate); `update` goes into all manifests.
    Models are renamed copies of the tiny one, "b" has its first layer only."""

    def model(name: str) -> Geometry:
        layers = geometry.layers[:1] if name == "b" else geometry.layers
        return geometry.model_copy(update={"name": name, "weights": name * 8, "layers": layers})

    def make(*maps: tuple[str, str, Certificate | None], **update: Any) -> CompatibilityChecker:
        entries = []
        for i, (source, target, found) in enumerate(maps):
            document = found and found.model_dump(mode="json")
            ends = {"source": model(source), "target": model(target)}
            manifest = wmatrix.manifest.model_copy(
                update={**ends, "certificate": document, **update}
            )
            entries.append(WMatrixEntry(Path(f"{i}.wmatrix"), manifest, f"digest-{i}"))
        return CompatibilityChecker(Registry(tuple(entries)))

    return make


def test_it_is_exported_without_loading_torch() -> None:
    assert awareness_vllm.CompatibilityChecker is CompatibilityChecker
    assert "CompatibilityChecker" in awareness_vllm.__all__
    code = "import sys, awareness_vllm; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_home_without_maps_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "fresh"))
    assert CompatibilityChecker().registry.entries == ()


def test_the_first_map_of_the_pair_is_the_estimate(over: MakeChecker) -> None:
    """As a server uses it: the operator's order decides, not what a file says of itself."""
    checker = over(
        ("b", "c", certificate(0.7)),
        ("a", "b", certificate(0.92, tier=1)),
        ("a", "b", certificate(1.0, tier=1)),
        ("a", "b", None),
        ("b", "a", certificate(0.99)),
        ("a", "c", certificate(0.98)),
    )
    found = checker.estimate(source_model="a", target_model="b")
    assert (found.source, found.target) == ("a", "b")
    assert (found.retention, found.ci_low, found.ci_high) == pytest.approx((0.92, 0.89, 0.95))
    assert found.basis is not None
    assert (found.basis.kind, found.basis.digest) == ("measured", "digest-1")
    assert "1.wmatrix" in found.basis.source
    assert found.alignment_quality == pytest.approx(0.85)
    assert found.dimensional_loss == 0.1
    assert found.structural_mismatch is not None
    assert 0 < found.structural_mismatch < 1
    assert found.risk_level == "Low"
    assert found.recommendation.startswith("Recommended; facts are recalled 0.58 times")


@pytest.mark.parametrize(
    ("tier", "risk"), [(1, "Low"), (2, "Medium"), (3, "High"), (4, "High"), (None, "High")]
)
def test_risk_is_the_tiers_which_counts_facts(
    over: MakeChecker, tier: int | None, risk: str
) -> None:
    checker = over(("a", "b", certificate(0.96, tier=tier)))
    assert checker.estimate(source_model="a", target_model="b").risk_level == risk


def test_figures_without_a_measurement_are_none(over: MakeChecker) -> None:
    checker = over(("a", "b", certificate(0.9, metrics=False)), reconstruction_error=None)
    found = checker.estimate(source_model="a", target_model="b")
    assert (found.alignment_quality, found.dimensional_loss) == (None, None)


def test_a_map_that_is_worse_than_nothing_still_has_figures_in_range(over: MakeChecker) -> None:
    awful = certificate(-0.4, tier=None)
    assert awful.metrics is not None
    away = awful.metrics.model_copy(update={"semantic_preservation": (-0.5, -0.1)})
    awful = awful.model_copy(update={"metrics": away})
    checker = over(("a", "b", awful), reconstruction_error=1.5)
    found = checker.estimate(source_model="a", target_model="b")
    assert found.retention == pytest.approx(-0.4)
    assert (found.alignment_quality, found.dimensional_loss) == (0.0, 1.0)
    assert found.recommendation.startswith("Not recommended")


@pytest.mark.parametrize(
    ("maps", "remedy"),
    [
        ([("a", "b", None)], "`awareness certify 0.wmatrix`"),
        ([("a", "c", None), ("d", "b", None)], "`awareness fit` from a to b"),
    ],
)
def test_without_certificate_it_says_what_to_do(
    over: MakeChecker, maps: list[tuple[str, str, None]], remedy: str
) -> None:
    found = over(*maps).estimate(source_model="a", target_model="b")
    assert (found.retention, found.ci_low, found.ci_high, found.basis) == (None,) * 4
    assert found.alignment_quality is None
    assert found.dimensional_loss == (0.1 if len(maps) == 1 else None)
    assert found.structural_mismatch is not None
    assert found.risk_level == "High"
    assert found.recommendation.startswith("Unknown: ")
    assert remedy in found.recommendation


def test_models_of_which_only_one_is_at_hand(over: MakeChecker) -> None:
    found = over(("a", "b", None)).estimate(source_model="gpt-4", target_model="b")
    assert (found.source, found.retention, found.structural_mismatch) == ("GPT-4", None, None)
    assert "the folder of GPT-4, fit a map" in found.recommendation


def test_one_model_is_a_copy(over: MakeChecker) -> None:
    found = over(("a", "b", None)).estimate(source_model="a", target_model="a")
    assert (found.retention, found.ci_low, found.ci_high) == (1, 1, 1)
    assert found.basis is not None
    assert found.basis.kind == "exact"
    figures = (found.alignment_quality, found.dimensional_loss, found.structural_mismatch)
    assert figures == (1, 0, 0)
    assert (found.risk_level, found.recommendation) == ("Low", "Proceed with confidence")


def test_published_names_have_published_figures() -> None:
    checker = CompatibilityChecker([])
    found = checker.estimate(source_model="gpt-4", target_model="llama-3.1-70b")
    assert (found.source, found.target) == ("GPT-4", "LLaMA 3.1 70B")
    assert found.retention == 0.91
    assert found.basis is not None
    assert (found.basis.kind, found.basis.digest) == ("prior", None)
    # 91 % is of the first tier, with a reconstruction error of at most 0.02.
    assert found.dimensional_loss == pytest.approx(0.01)
    assert found.alignment_quality == pytest.approx(0.99)
    assert found.structural_mismatch is None
    assert "not measured here" in found.recommendation
    assert "folder of GPT-4 and of LLaMA 3.1 70B" in found.recommendation


def test_a_listing_of_a_vector_has_the_figures_of_vectors() -> None:
    found = CompatibilityChecker([]).estimate(
        vector_listing=SimpleNamespace(source_model="gpt-4"),
        target_model="llama-3.1-70b",
        target_config={"quantization": "fp16", "context_length": 128000},
    )
    assert found.retention == 0.85
    # On the border of two tiers, with errors of 0.02 to 0.05 and 0.05 to 0.10.
    assert found.alignment_quality == pytest.approx(0.94)
    assert found.basis is not None
    assert "Full Support Matrix" in found.basis.source


def test_a_listing_of_a_model_at_hand_has_its_certificate(over: MakeChecker) -> None:
    checker = over(("a", "b", certificate(0.9)))
    by_listing = checker.estimate(SimpleNamespace(source_model="a"), "b")
    assert by_listing == checker.estimate(source_model="a", target_model="b")


def test_measured_goes_before_published(over: MakeChecker) -> None:
    checker = over(("gpt-4", "gpt-4o", certificate(0.5)), ("gpt-4o", "gpt-4", None))
    found = checker.estimate(source_model="gpt-4", target_model="gpt-4o")
    assert found.basis is not None
    assert (found.retention, found.basis.kind) == (0.5, "measured")
    # The way back was never measured: the published figure, and the map to certify.
    found = checker.estimate(source_model="gpt-4o", target_model="gpt-4")
    assert found.basis is not None
    assert (found.retention, found.basis.kind) == (0.96, "prior")
    assert found.risk_level == "Medium"
    assert "`awareness certify 1.wmatrix`" in found.recommendation


def test_a_map_filled_with_priors_is_not_measured(over: MakeChecker) -> None:
    figure = {"mean": 0.99, "ci_low": 0.98, "ci_high": 1.0}
    prior = {"retention": figure, "facts": figure, "tier": 1}
    checker = over(("a", "b", None), certificate=prior)
    found = checker.estimate(source_model="a", target_model="b")
    assert (found.retention, found.basis, found.risk_level) == (None, None, "High")


def test_models_are_given_by_folder(
    over: MakeChecker,
    make_model: Callable[..., Path],
    byte_level_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    folder = make_model(tmp_path / "here", byte_level_tokenizer, hidden=8, layers=1, heads=1)
    found = over(("a", "b", None)).estimate(source_model=folder, target_model="b")
    assert (found.source, found.retention) == ("here", None)
    assert found.structural_mismatch is not None
    same = CompatibilityChecker([]).estimate(source_model=str(folder), target_model=folder)
    assert same.basis is not None
    assert same.basis.kind == "exact"


def test_unknown_names_get_the_nearest_of_both_kinds(over: MakeChecker) -> None:
    checker = over(("smollm2-135m", "gemma3-270m", None))
    with pytest.raises(BadInput, match="one of smollm2-135m"):
        checker.estimate(source_model="smolm2-135", target_model="gemma3-270m")
    with pytest.raises(BadInput, match=r"one of .*Mistral Large"):
        checker.estimate(source_model="smollm2-135m", target_model="mistral-larg")


def test_two_models_of_one_name_are_told_apart_by_folder(over: MakeChecker) -> None:
    first, entry = over(("a", "b", None), ("a", "b", None)).registry
    other = entry.manifest.source.model_copy(update={"weights": "z" * 64})
    manifest = entry.manifest.model_copy(update={"source": other})
    second = WMatrixEntry(entry.path, manifest, entry.digest)
    checker = CompatibilityChecker(Registry((first, second)))
    with pytest.raises(BadInput, match=r"2 models .* 'a'.*folder"):
        checker.estimate(source_model="a", target_model="b")


@pytest.mark.parametrize("config", [{"num_gpu": 2}, {"context_length": 10**9}, {"num_gpus": 7}])
def test_a_target_that_could_not_be_served_so(over: MakeChecker, config: dict[str, Any]) -> None:
    checker = over(("a", "b", None))
    with pytest.raises(BadInput, match=next(iter(config))):
        checker.estimate(source_model="a", target_model="b", target_config=config)


@pytest.mark.parametrize(
    "given",
    [
        {"target_model": "gpt-4"},
        {"source_model": "gpt-4"},
        {
            "source_model": "gpt-4",
            "vector_listing": SimpleNamespace(source_model="gpt-4"),
            "target_model": "gpt-4",
        },
    ],
)
def test_one_source_and_one_target(given: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="one source and one target"):
        CompatibilityChecker([]).estimate(**given)


NAMES = st.sampled_from([*tables().models, "a", "b", "c"]) | st.text(max_size=12)


@settings(deadline=None)
@given(NAMES, NAMES, st.booleans())
@example("~0", "b", False)
@example("a", "x" * 300, True)
@example("a\0", "b", False)
def test_any_names_give_an_estimate_or_bad_input(
    over: MakeChecker, source: str, target: str, vector: bool
) -> None:
    checker = over(("a", "b", certificate(0.9)), ("b", "c", None))
    given_source: dict[str, Any] = {"source_model": source}
    if vector:
        given_source = {"vector_listing": SimpleNamespace(source_model=source)}
    try:
        found = checker.estimate(**given_source, target_model=target)
    except BadInput:
        known = {*tables().models, "a", "b", "c"}
        assert not {source, target} <= known
        return
    figures = (found.ci_low, found.retention, found.ci_high)
    if found.basis is None:
        assert figures == (None, None, None)
        assert found.risk_level == "High"
    else:
        low, mean, high = (figure for figure in figures if figure is not None)
        assert 0 <= low <= mean <= high <= 1
        assert found.basis.kind != "prior" or found.risk_level != "Low"
    assert found.recommendation


LAYERS = st.builds(
    LayerGeometry,
    heads=st.integers(1, 128),
    head_dim=st.integers(1, 512),
    positions=st.builds(Positions, scheme=st.sampled_from(["rope", "yarn", "learned", "alibi"])),
    window=st.none() | st.integers(1, 10**6),
)


def shaped(geometry: Geometry, layers: list[LayerGeometry]) -> Geometry:
    return geometry.model_copy(update={"layers": tuple(layers)})


@settings(deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=9), st.lists(LAYERS, min_size=1, max_size=9))
def test_mismatch_is_a_share_and_nothing_for_the_same_shape(
    geometry: Geometry, some: list[LayerGeometry], others: list[LayerGeometry]
) -> None:
    assert 0 <= structural_mismatch(shaped(geometry, some), shaped(geometry, others)) < 1
    assert structural_mismatch(shaped(geometry, some), shaped(geometry, some)) == 0


@pytest.mark.parametrize(
    ("update", "count", "expected"),
    [
        ({}, 2, 0.0),
        ({}, 1, (0.5 + 0.5) / 6),  # layers and width
        ({"heads": 4}, 2, (0.5 + 0.5) / 6),  # heads and width
        ({"head_dim": 16}, 2, (0.75 + 0.75) / 6),  # head dim and width
        ({"positions": Positions(scheme="alibi")}, 2, 1 / 6),
        ({"window": 512}, 2, 1 / 6),
        ({"heads": 4, "head_dim": 32}, 2, (0.5 + 0.875 + 0.9375) / 6),
    ],
)
def test_mismatch_by_hand(
    geometry: Geometry, update: dict[str, Any], count: int, expected: float
) -> None:
    layer = LayerGeometry(heads=2, head_dim=4, positions=Positions(scheme="rope", theta=1e4))
    other = layer.model_copy(update=update)
    found = structural_mismatch(shaped(geometry, [layer] * 2), shaped(geometry, [other] * count))
    assert found == pytest.approx(expected)
    windows = [layer.model_copy(update={"window": w}) for w in (512, 2048)]
    ends = [shaped(geometry, [window]) for window in windows]
    assert structural_mismatch(*ends) == pytest.approx(0.75 / 6)
