"""Routes over W-Matrices and over published figures: the best one, and the basis of its figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import awareness_vllm
from awareness_vllm import MultiHopAligner, MultiHopMemoryAligner
from awareness_vllm.aligners import multihop
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput, NoWMatrix, UnsupportedModel
from awareness_vllm.evaluate.evaluate import TextFigures
from awareness_vllm.evaluate.flops import map_flop
from awareness_vllm.fit import gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan, Protocol
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit


@pytest.fixture
def over(wmatrix: WMatrix, geometry: Geometry) -> Callable[..., MultiHopAligner]:
    """An aligner over maps given as "a-b": what is certified to be kept of 300 and of 1000 tokens
    (one figure: of both; None: not certified). Nodes are renamed copies of the tiny geometry."""

    def model(name: str) -> Geometry:
        return geometry.model_copy(update={"name": name, "weights": name * 8})

    def make(predecessors: int | None = 1, **given: Any) -> MultiHopAligner:
        entries = []
        for ends, kept in given.items():
            source, target = (model(name) for name in ends.split("_")[:2])
            update = {"source": source, "target": target, "predecessors": predecessors}
            manifest = wmatrix.manifest.model_copy(update=update)
            entry = WMatrixEntry(Path(f"{ends}.wmatrix"), manifest, ends)
            entry.__dict__["certificate"] = certified(kept)
            entries.append(entry)
        return MultiHopAligner(Registry(tuple(entries)))

    return make


def certified(kept: float | tuple[float, float] | None) -> Certificate | None:
    if kept is None:
        return None
    figures = kept if isinstance(kept, tuple) else (kept, kept)
    plans = [
        Plan(
            context=context,
            tail=tail,
            cost=0.1,
            retention=Interval(mean=figure + tail / 100, ci_low=0, ci_high=1),
            kinds={},
            top1=0,
            tokens_only=Interval(mean=0, ci_low=0, ci_high=0),
        )
        for context, figure in zip((300, 1000), figures, strict=True)
        for tail in (0, 16)
    ]
    retention = Interval(mean=figures[0], ci_low=0, ci_high=1)
    protocol = Protocol(texts="", cases="", limit=1, context=300, continuation=60)
    return Certificate.model_construct(plans=tuple(plans), protocol=protocol, retention=retention)


@pytest.mark.parametrize("name", ["~0", "x" * 300, "a\0"])
def test_any_text_is_a_name_or_bad_input(over: Callable[..., MultiHopAligner], name: str) -> None:
    with pytest.raises(BadInput, match="unknown model"):
        over(a_b=0.9).find_optimal_path(name, "b")


def test_the_names_are_one_class() -> None:
    assert awareness_vllm.MultiHopAligner is awareness_vllm.MultiHopMemoryAligner
    assert MultiHopMemoryAligner is MultiHopAligner


@pytest.mark.parametrize(
    ("maps", "route", "direct", "best", "basis"),
    [
        ({"a_c": 0.9, "a_b": 0.9, "b_c": 0.9}, "ac", 0.9, 0.9, "certified"),
        ({"a_c": 0.5, "a_b": 0.9, "b_c": 0.8}, "abc", 0.5, 0.72, "estimated"),
        ({"a_b": 0.9, "b_c": 0.8}, "abc", None, 0.72, "estimated"),
        ({"a_c": 0.6}, "ac", 0.6, 0.6, "certified"),
        ({"a_b": 0.6, "a_d": 0.9, "d_b": 0.9, "b_c": 0.9}, "adbc", None, 0.729, "estimated"),
        ({"a_c": 0.4, "a_c_2": 0.7, "a_b": 0.9, "b_c": 0.7}, "ac", 0.7, 0.7, "certified"),
        ({"a_c": -0.3, "a_b": 1.01, "b_c": 0.5}, "abc", -0.3, 0.5, "estimated"),
        ({"a_b": 0.9, "b_a": 0.9, "b_c": 0.9}, "abc", None, 0.81, "estimated"),
    ],
)
def test_the_way_that_keeps_most_is_found(
    over: Callable[..., MultiHopAligner],
    maps: dict[str, float],
    route: str,
    direct: float | None,
    best: float,
    basis: str,
) -> None:
    found = over(**maps).find_optimal_path("a", "c")
    assert "".join(found.route) == route
    assert found.path == found.route
    assert found.direct_retention == direct
    assert found.optimal_retention == found.estimated_retention == pytest.approx(best)
    assert found.basis == basis
    if direct is None:
        assert found.improvement is None
    else:
        assert found.improvement == pytest.approx(best - direct)


def test_a_longer_memory_takes_the_way_that_is_better_for_it(
    over: Callable[..., MultiHopAligner], make_package: Callable[..., Package]
) -> None:
    aligner = over(tiny_c=(0.9, 0.5), tiny_b=(0.9, 0.9), b_c=(0.9, 0.9))
    package = make_package("x" * 600)
    for entry in aligner.registry:
        if entry.manifest.source.name == "tiny":
            manifest = entry.manifest.model_copy(update={"source": package.geometry})
            entry.__dict__["manifest"] = manifest
    assert aligner.find_optimal_path("tiny", "c").route == ("tiny", "c")
    assert aligner.find_optimal_path("tiny", "c", package).route == ("tiny", "b", "c")
    with pytest.raises(UnsupportedModel, match="captured on another model"):
        aligner.find_optimal_path("b", "c", package)


def test_uncertified_maps_are_used_where_asked_for(over: Callable[..., MultiHopAligner]) -> None:
    aligner = over(a_c=None, a_b=0.6, b_c=0.6)
    found = aligner.find_optimal_path("a", "c")
    assert (found.route, found.direct_retention, found.improvement) == (("a", "b", "c"), None, None)
    assert "never measured" in found.note
    assert aligner.find_optimal_path("a", "c", uncertified=True).route == ("a", "b", "c")
    with pytest.raises(NoWMatrix, match=r"certify. a → b \(a_b"):
        over(a_b=None, b_c=0.9).find_optimal_path("a", "c")
    found = over(a_b=None, b_c=0.9, a_d=None, d_b=None).find_optimal_path(
        "a", "c", uncertified=True
    )
    assert found.route == ("a", "b", "c")
    assert (found.optimal_retention, found.basis) == (None, None)
    found = over(a_b=None, b_c=0.9, a_d=0.5, d_c=0.5).find_optimal_path("a", "c", uncertified=True)
    assert found.route == ("a", "d", "c")
    found = over(a_b=None, b_c=0.9, a_c=None).find_optimal_path("a", "c", uncertified=True)
    assert found.route == ("a", "c")


def test_an_older_versions_certificate_is_none(
    over: Callable[..., MultiHopAligner], caplog: pytest.LogCaptureFixture
) -> None:
    (entry,) = over(a_b=0.9).registry
    manifest = entry.manifest.model_copy(update={"certificate": {"retention": {"mean": 0.9}}})
    aligner = MultiHopAligner(Registry((replace(entry, manifest=manifest),)))
    with pytest.raises(NoWMatrix, match="certify"):
        aligner.find_optimal_path("a", "b")
    assert "certify it again" in caplog.text


def test_a_note_says_how_the_direct_map_fared(over: Callable[..., MultiHopAligner]) -> None:
    def said(**maps: float) -> str:
        return over(**maps).find_optimal_path("a", "c").note

    assert "no other route" in said(a_c=0.9, a_b=0.5, b_c=0.5)
    assert "more than the direct map" in said(a_c=0.1, a_b=0.5, b_c=0.5)
    assert "there is no direct map" in said(a_b=0.5, b_c=0.5)


def test_one_model_is_a_copy(over: Callable[..., MultiHopAligner]) -> None:
    found = over(a_b=0.9).find_optimal_path("a", "a")
    assert (found.route, found.optimal_retention, found.basis) == (("a",), 1.0, "exact")
    with pytest.raises(BadInput, match="nothing to compose"):
        over(a_b=0.9).compose(found)


def test_what_leads_nowhere_is_said(over: Callable[..., MultiHopAligner]) -> None:
    with pytest.raises(NoWMatrix, match="no route leads from c to a"):
        over(a_b=0.9, b_c=0.9).find_optimal_path("c", "a")
    with pytest.raises(BadInput, match=r"'gemma3'.*one of gemma3-270m"):
        over(**{"gemma3-270m_smollm2-135m": 0.5}).find_optimal_path("gemma3", "smollm2-135m")
    (entry,) = over(a_b=0.9).registry
    twin = entry.manifest
    twin = twin.model_copy(update={"target": twin.target.model_copy(update={"weights": "x"})})
    aligner = MultiHopAligner(Registry((entry, replace(entry, manifest=twin))))
    with pytest.raises(BadInput, match=r"2 models .*give the model's folder"):
        aligner.find_optimal_path("a", "b")


def test_packages_without_text_go_over_maps_that_read_none(
    over: Callable[..., MultiHopAligner], make_package: Callable[..., Package]
) -> None:
    package = make_package("hello")
    manifest = package.manifest.model_copy(
        update={
            "has_text": False,
            "geometry": package.geometry.model_copy(update={"name": "a", "weights": "a" * 8}),
        }
    )
    package = replace(package, manifest=manifest)
    with pytest.raises(NoWMatrix):
        over(a_b=0.9).find_optimal_path("a", "b", package)
    found = over(predecessors=None, a_b=0.9).find_optimal_path("a", "b", package)
    assert found.optimal_retention == 0.9
    with pytest.raises(NoWMatrix):
        over(predecessors=None, a_b=0.9).find_optimal_path("a", "b")


@pytest.fixture(scope="module")
def three(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    byte_level_tokenizer: Tokenizer,
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[Path], Path]:
    """Three tiny models, and a folder with maps from the first to the second, from there to the
    third, and all the way."""
    root = tmp_path_factory.mktemp("three")
    folders = [*tiny_models, make_model(root / "third", byte_level_tokenizer, 32, 3, 2)]
    config = FitConfig(tokens=1000, rank=4, predecessors=0, calibration=0, held_out=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        for a, b in ((0, 1), (1, 2), (0, 2)):
            made = fit(folders[a], folders[b], anchors, config, progress=False)
            made.save(root / "maps" / f"{a}{b}.wmatrix")
    return folders, root / "maps"


@pytest.mark.slow
def test_a_route_is_composed_and_measured(
    three: tuple[list[Path], Path], anchors: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, maps = three
    monkeypatch.setattr(multihop, "learn_bridge", short(multihop.learn_bridge))
    measured: list[tuple[str, ...]] = []

    def evaluate(harness: Any, *args: object, **given: Any) -> TextFigures:
        composed = harness.wmatrix.manifest.composed
        measured.append(composed)
        nll = {"native": 1.0, "memory": 1.2 if composed else 1.4, "none": 2.0}
        return TextFigures(["a", "b"], {arm: np.full((2, 3), x) for arm, x in nll.items()})

    monkeypatch.setattr(multihop, "evaluate_texts", evaluate)
    aligner = MultiHopAligner([maps], models=[folders[1]])
    found = aligner.find_optimal_path(
        folders[0], folders[2], uncertified=True, texts=anchors, anchors=anchors
    )
    assert [len(composed) for composed in measured] == [0, 2]
    assert found.route == ("source", "target", "third")
    assert (found.direct_retention, found.optimal_retention) == (
        pytest.approx(0.6),
        pytest.approx(0.8),
    )
    assert found.improvement == pytest.approx(0.2)
    assert found.basis == "measured"
    assert "source → third keeps 0.600, source → target → third keeps 0.800" in found.note
    composed_map = aligner.compose(found)
    assert composed_map is found.composed_map
    rows = composed_map.manifest.fit["bridge_rows"]
    assert isinstance(rows, int)
    assert rows > 500
    assert map_flop(composed_map) == map_flop(load(maps / "02.wmatrix"))


def short(learn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: learn(*args, rows=600)


@pytest.mark.slow
def test_a_missing_model_is_named(three: tuple[list[Path], Path], anchors: list[Document]) -> None:
    folders, maps = three
    aligner = MultiHopAligner([maps / "01.wmatrix", maps / "12.wmatrix"])
    path = aligner.find_optimal_path(folders[0], folders[2], uncertified=True)
    with pytest.raises(UnsupportedModel, match="the model target is not at hand"):
        aligner.compose(path, anchors)
    assert aligner.compose(path).manifest.fit == {"bridge_rows": 0}


@pytest.mark.slow
def test_the_command_finds_and_composes(
    three: tuple[list[Path], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders, maps = three
    hops = [str(maps / "01.wmatrix"), str(maps / "12.wmatrix")]
    argv = ["path", "--from", "source", "--to", "third", "--wmatrix", *hops, "--uncertified"]
    out = tmp_path / "composed.wmatrix"
    assert main([*argv, "--compose", str(out), "--models", str(folders[1]), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["route"] == ["source", "target", "third"]
    assert (found["wmatrices"], found["composed"]) == (hops, str(out))
    assert (found["optimal_retention"], found["basis"]) == (None, None)
    assert len(load(out).manifest.composed) == 2
    assert main([*argv, "--compose", str(out)]) == 0
    printed = capfd.readouterr().out
    assert str(out) in printed
    assert "source → target → third\nretention unknown (never measured)" in printed
    assert "there is no direct map" in printed
    assert main([*argv[:-1], "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "NoWMatrix"
