"""The compatibility matrix: certificates in, priors beside them, no two models taken for one."""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from awareness_vllm.cli.main import main
from awareness_vllm.compatibility.matrix import matrix, of_registry
from awareness_vllm.compatibility.report import Basis, Cell, Matrix
from awareness_vllm.errors import WMatrixCorrupt
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan, Protocol
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

pytestmark = pytest.mark.unit

NOTHING = Interval(mean=0, ci_low=0, ci_high=0)
PRIOR = Basis(kind="prior", source="a publication")


def certificate(kept: float) -> Certificate:
    retention = Interval(mean=kept, ci_low=kept - 0.02, ci_high=kept + 0.03)
    plan = Plan(
        context=300, tail=0, cost=0.1, retention=retention, kinds={}, top1=0, tokens_only=NOTHING
    )
    return Certificate(
        protocol=Protocol(texts="", cases="", limit=48, context=300, continuation=60),
        texts={},
        cases={},
        metrics=None,
        retention=retention,
        margin=NOTHING,
        plans=(plan,),
        facts=NOTHING,
        facts_kinds={},
        facts_distances={},
        facts_margin=NOTHING,
        counts={"texts": 48, "cases": 0},
        tier=None,
        measured=datetime.date(2026, 11, 23),
        hardware="",
        versions={},
    )


@pytest.fixture
def put(wmatrix: WMatrix, tmp_path: Path) -> Callable[..., Path]:
    """Writes a W-Matrix between two models of these names (and weights, by default the name's)."""

    def write(
        file: str, source: str, target: str, kept: float | None, weights: str | None = None
    ) -> Path:
        model = wmatrix.manifest.source
        ends = {
            "source": model.model_copy(update={"name": source, "weights": weights or source}),
            "target": model.model_copy(update={"name": target, "weights": target}),
        }
        found = None if kept is None else certificate(kept).model_dump(mode="json")
        manifest = wmatrix.manifest.model_copy(update={**ends, "certificate": found})
        path = tmp_path / f"{file}.wmatrix"
        tensors = {name: torch.zeros(shape) for name, shape in manifest.tensor_shapes.items()}
        sinks = {
            f"sink_{part}s": [tensors[f"sink.{i}.{part}"] for i in range(len(model.layers))]
            for part in ("key", "value")
        }
        parts = {name: tensors[name] for name in ("mean", "scale", "encode", "decode", "bias")}
        replace(wmatrix, manifest=manifest, **parts, **sinks).save(path)
        return path

    return write


def prior(source: str, target: str, about: float) -> Cell:
    kept = Interval(mean=about, ci_low=about, ci_high=about)
    return Cell(source=source, target=target, retention=kept, basis=PRIOR)


def test_a_certificate_is_a_measured_cell(put: Callable[..., Path]) -> None:
    path = put("ab", "a", "b", 0.9)
    found = matrix([path])
    assert (found.sources, found.targets) == (("a",), ("b",))
    (cell,) = found.cells
    assert cell.retention == Interval(mean=0.9, ci_low=0.88, ci_high=0.93)
    assert cell.basis == Basis(
        kind="measured",
        source="ab.wmatrix: 48 texts of 300 tokens, 2026-11-23",
        digest=WMatrixEntry.read(path).digest,
    )


def test_of_several_for_a_pair_the_first_certified_counts(put: Callable[..., Path]) -> None:
    """Not the one that promises most: its figures are the word of whoever wrote the file."""
    for name, kept in (("1", None), ("two", 0.7), ("zzz", 0.8)):
        folder = put(name, "a", "b", kept).parent
    (cell,) = matrix([folder]).cells
    assert cell.basis is not None
    assert cell.basis.source.startswith("two.wmatrix")
    none, two, three = Registry.read([folder])
    claims = [replace(entry, claimed=True) for entry in (two, three)]
    for entries, shown in (((none, *claims), "two"), ((none, claims[0], three), "zzz")):
        (cell,) = of_registry(Registry(entries)).cells
        assert cell.basis is not None
        assert cell.basis.source.startswith(f"{shown}.wmatrix")


def test_what_nobody_measured_has_no_figure(put: Callable[..., Path]) -> None:
    found = matrix([put("ab", "a", "b", None)])
    assert found.cells == (Cell(source="a", target="b", retention=None, basis=None),)


def test_different_models_of_one_name_stay_apart(put: Callable[..., Path]) -> None:
    paths = [put("one", "a", "b", 0.9), put("two", "a", "b", 0.7, weights="tuned")]
    found = matrix(paths)
    assert found.targets == ("b",)
    assert len(set(found.sources)) == len(found.cells) == 2
    assert all(
        name.startswith("a (") and len(name) == len("a (12345678)") for name in found.sources
    )
    kept = [found.cell(name, "b") for name in found.sources]
    assert [cell.retention.mean for cell in kept if cell and cell.retention] == [0.9, 0.7]


def test_one_model_under_two_names_is_one(put: Callable[..., Path]) -> None:
    paths = [put("one", "a", "b", 0.7), put("two", "copy-of-a", "b", 0.9, weights="a")]
    (cell,) = matrix(paths).cells
    assert (cell.source, cell.retention and cell.retention.mean) == ("a", 0.7)


def test_priors_stand_beside_and_never_before(put: Callable[..., Path]) -> None:
    paths = [put("ab", "a", "b", 0.7), put("bc", "b", "c", None)]
    found = matrix(paths, priors=[prior("a", "b", 0.99), prior("b", "c", 0.9), prior("X", "X", 1)])
    # One order of the models on both sides.
    assert (found.sources, found.targets) == (("a", "b", "X"), ("b", "c", "X"))
    kinds = {
        pair: cell.basis.kind if (cell := found.cell(*pair)) and cell.basis else None
        for pair in (("a", "b"), ("b", "c"), ("X", "X"), ("a", "X"))
    }
    assert list(kinds.values()) == ["measured", "prior", "prior", None]


def test_a_file_that_was_named_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "bad.wmatrix").write_bytes(b"no")
    assert matrix([tmp_path]) == Matrix(sources=(), targets=(), cells=())
    with pytest.raises(WMatrixCorrupt):
        matrix([tmp_path / "bad.wmatrix"])


def test_the_command_prints_and_writes(
    put: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    published = SimpleNamespace(published_cells=lambda: [prior("GPT-4", "GPT-4o", 0.97)])
    monkeypatch.setitem(sys.modules, "awareness_vllm.compatibility.priors", published)
    folder = put("ab", "a", "b", 0.9).parent
    put("ba", "b", "a", None)
    html = tmp_path / "m.html"
    argv = ["matrix", "--wmatrix", str(folder), "--priors"]
    assert main([*argv, "--html", str(html)]) == 0
    assert capfd.readouterr().out.splitlines() == [
        "a     → b       90.0 % (88.0 … 93.0)",
        "b     → a       not certified",
        "GPT-4 → GPT-4o  ~97 % (prior)",
        str(html),
    ]
    assert html.read_text().startswith("<!doctype html>")
    assert main([*argv, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert Matrix.model_validate(document["matrix"]).cell("GPT-4", "GPT-4o")


def test_without_the_flag_there_are_no_priors_and_a_new_home_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "new"))
    assert main(["matrix"]) == 0
    assert "awareness fit" in capfd.readouterr().out
