"""Every Python block of the two published documents: as printed, and on local models.

A block that cannot run as printed raises exactly the typed error that PRINTED states, with the
reason; on local models each one runs to its end, once the lines that cannot are left out (LOCAL).
"""

from __future__ import annotations

import datetime
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

import awareness_vllm
from awareness_vllm.anchors.corpus import Document, digest, load, sources
from awareness_vllm.errors import (
    AwarenessError,
    BadInput,
    NotAvailable,
    UnsupportedModel,
    WMatrixCorrupt,
)
from awareness_vllm.fit import gather, trainer
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, build, publish
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Metrics, Plan, Protocol
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

SEEDS = Path(__file__).parents[1] / "data" / "seeds"
CROSS, MATRIX = "cross-model-compatibility.md", "w-matrix-alignment.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
Key = tuple[str, int]
"""A document, and the number of a Python block in it."""


def blocks() -> dict[Key, str]:
    """The Python blocks of both documents, the SDK's name replaced by ours."""
    return {
        (name, i): code.replace("awareness_sdk", "awareness_vllm")
        for name in (CROSS, MATRIX)
        for i, code in enumerate(BLOCK.findall((SEEDS / name).read_text()))
    }


def listing(source: str, tokens: int = 12_000) -> SimpleNamespace:
    return SimpleNamespace(name="a memory", source_model=source, token_count=tokens)


@dataclass(frozen=True)
class Printed:
    """What a block does as it is printed: the error that it ends with and why, or else a pattern of
    what it prints, once `names` are there."""

    error: type[AwarenessError] | None = None
    why: str = ""
    prints: str = ""
    names: dict[str, Any] = field(default_factory=dict)


PRINTED: dict[Key, Printed] = {
    (CROSS, 0): Printed(UnsupportedModel, "nobody outside has the weights or KV states of GPT-4"),
    (CROSS, 1): Printed(prints=r"Source: gpt-4 \(12 tokens\)[^$]*retention: +9\d\.\d%[^$]*impact:"),
    (CROSS, 2): Printed(
        prints=r"78\.\d%\n.*Falcon 180B -> Phi-3 Medium\n.*78\.\d%\nImprovement: \+0\.0%",
        names={"source_kv_cache": listing("falcon-180b")},
    ),
    (MATRIX, 0): Printed(UnsupportedModel, "nobody outside has the weights or KV states of GPT-4"),
    (MATRIX, 1): Printed(NotAvailable, "there are no vector packages before part L"),
    (MATRIX, 2): Printed(WMatrixCorrupt, "the reader has no file of that name"),
    (MATRIX, 3): Printed(UnsupportedModel, "an endpoint returns text, and no KV states"),
    (MATRIX, 4): Printed(prints=r"Falcon 180B -> Phi-3 Medium\n.*78\.\d%\n.*78\.\d%"),
}
VECTORS = (r"^listing = .*\n",)
"""What cannot run of the block about vectors: `listing` is given instead."""
LOCAL: dict[Key, tuple[str, tuple[str, ...]]] = {
    (CROSS, 0): (r"layer 0 head 0 key[^$]*Alignment quality: 0\.950", ()),
    (CROSS, 1): (r"retention: +95\.0%\n.*0\.800\n.*0\.995\n.*GB\n.*seconds\n[^$]*impact:", ()),
    (CROSS, 2): (r"50\.0%\n.*source -> target -> third\n.*90\.2%\nImprovement: \+40\.2%", ()),
    (MATRIX, 0): (r"Training complete\nAlignment accuracy: -?\d.\d{3}\n.*error: 0\.\d{4}", ()),
    (MATRIX, 1): (r"95\.0%\n.*94\.0% - 96\.0%\n.*0\.850\n.*Medium\n.*Recommended", VECTORS),
    (MATRIX, 2): (r"2026-11-26\nCurrent accuracy: -?\d+\.\d{3}\nDrift detected: (True|False)", ()),
    (MATRIX, 3): ("", (r",\n +source_endpoint=.*\n +target_endpoint=.*",)),
    (MATRIX, 4): (r"source -> target -> third\n.*90\.2%\n.*50\.0%", ()),
}
"""What each block prints on local models, and patterns of the lines that are left out."""


def test_the_tables_have_every_block() -> None:
    assert list(blocks()) == list(PRINTED) == list(LOCAL)


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "a published block", "exec"), {"__name__": "block", **names})


def offer(memory: Package, folder: Path) -> None:
    """Have the default registry offer a memory under the tag that the documents print."""
    path = publish(memory, folder)
    awareness_vllm.Marketplace().memories.publish(path, tags=["mem_xyz789"])


def of_gpt_4(memory: Package) -> Package:
    """A memory as if GPT-4 had computed it."""
    geometry = memory.geometry.model_copy(update={"name": "gpt-4"})
    parts = {name: getattr(memory, name) for name in ("text", "tokens", "spans", "keys", "values")}
    return build(geometry=geometry, engine="transformers", versions={}, **parts)


@pytest.mark.parametrize("key", PRINTED, ids=str)
def test_as_printed(
    key: Key,
    make_package: Callable[..., Package],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    if key == (CROSS, 1):
        offer(of_gpt_4(make_package()), tmp_path)
    row = PRINTED[key]
    assert (row.error is None) != bool(row.why)
    with pytest.raises(row.error) if row.error else nullcontext() as caught:
        run(blocks()[key], row.names)
    if caught is not None:
        assert caught.type is row.error
        assert caught.value.remedy
    assert re.search(row.prints, capsys.readouterr().out)


def test_a_vector_listing_runs_on_published_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the block about vectors prints of GPT-4 on LLaMA 3.1 70B is a figure."""
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    run(without(blocks()[MATRIX, 1], VECTORS), {"listing": listing("gpt-4")})
    printed = capsys.readouterr().out
    assert "None" not in printed
    assert re.search(r"retention: +85\.0%", printed)


def without(code: str, patterns: tuple[str, ...]) -> str:
    """The code without what matches; each pattern has to."""
    for pattern in patterns:
        code, count = re.subn(pattern, "", code, flags=re.MULTILINE)
        assert count == 1, pattern
    return code


def interval(mean: float) -> Interval:
    return Interval(mean=mean, ci_low=mean - 0.01, ci_high=mean + 0.01)


def certificate(kept: float, texts: list[Document]) -> dict[str, Any]:
    """As if a map had been measured on these texts."""
    plan = Plan(
        context=1000,  # longer than the memories here: beyond it figures fall
        tail=0,
        cost=0.1,
        retention=interval(kept),
        kinds={"letters": interval(kept)},
        top1=0.5,
        tokens_only=interval(0),
    )
    metrics = Metrics(
        semantic_preservation=(0.9, 0.8),
        attention_fidelity=(0.7, 0.9),
        gradient_ratio=1,
        gradient_stability=True,
        n=2,
    )
    protocol = Protocol(
        texts=digest(texts), cases="", limit=4, context=100, continuation=8, sources=sources(texts)
    )
    figures = {name: interval(kept) for name in ("retention", "margin", "facts", "facts_margin")}
    return Certificate(
        protocol=protocol,
        texts={},
        cases={},
        metrics=metrics,
        plans=(plan,),
        facts_kinds={},
        facts_distances={},
        counts={"texts": 48, "cases": 48},
        tier=2,
        measured=datetime.date(2026, 11, 26),
        hardware="",
        versions={},
        **figures,
    ).model_dump(mode="json")


DOMAINS = ("general_knowledge", "reasoning", "language_understanding", "code", "mathematics")
KEPT = {"source--target": 0.95, "target--third": 0.95, "source--third": 0.5}


@dataclass(frozen=True)
class World:
    """A home with three tiny models, maps between them, texts; and a memory of the first one."""

    home: Path
    folders: dict[str, Path]
    memory: Package

    def local(self, code: str) -> str:
        """The code with names and settings of models replaced by those of the tiny ones."""
        for name, model in (
            ("gpt-4", "source"),
            ("your-custom-model", "source"),
            ("falcon-180b", "source"),
            ("llama-3.1-70b", "target"),
            ("phi-3-medium", "third"),
        ):
            code = code.replace(f'"{name}"', repr(str(self.folders[model])))
        return code.replace("128000", "4096").replace('"num_gpus": 4', '"num_gpus": 1')


@pytest.fixture(scope="module")
def world(
    make_model: Callable[..., Path],
    byte_level_tokenizer: Tokenizer,
    byte_fallback_tokenizer: Tokenizer,
    anchors: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[World]:
    home = tmp_path_factory.mktemp("published")
    models = home / "models"
    folders = {
        "source": make_model(models / "source", byte_level_tokenizer, 16, 4, 2),
        "target": make_model(models / "target", byte_fallback_tokenizer, 24, 2, 3),
        "third": make_model(models / "third", byte_level_tokenizer, 32, 3, 2),
    }
    for i, document in enumerate(anchors):
        domains = ("letters",) if i < 5 else (DOMAINS[i - 5], "your_domain")
        for domain in domains:
            folder = home / ("held-out" if domain == "letters" else "anchors") / domain
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{document.name}.txt").write_text(document.text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWARENESS_HOME", str(home))
        patch.setattr(gather, "CHUNK_ROWS", 256)
        texts = load([home / "held-out" / "letters"])
        for name, kept in KEPT.items():
            fitted(folders, name, anchors[5:], certificate(kept, texts)).register(name)
        yield World(home, folders, capture(folders["source"], anchors[0].text[:600]))


def fitted(
    folders: dict[str, Path], name: str, anchors: list[Document], document: dict[str, Any]
) -> WMatrix:
    """A map between two of the models with this certificate."""
    config = FitConfig(tokens=1000, rank=4, predecessors=0, calibration=0, held_out=0.3)
    source, target = name.split("--")
    wmatrix = fit(folders[source], folders[target], anchors, config, progress=False)
    update = {"certificate": document}
    return replace(wmatrix, manifest=wmatrix.manifest.model_copy(update=update))


@pytest.mark.parametrize(
    "key",
    LOCAL,
    ids=str,
)
@pytest.mark.slow
def test_on_local_models(
    key: Key,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = functools.partial(FitConfig, rank=4, calibration=2, predecessors=0)
    monkeypatch.setattr(trainer, "FitConfig", small)
    registered = world.home / "wmatrices"
    shutil.copy(registered / "source--target.wmatrix", "gpt4-to-llama3-70b.wmatrix")
    prints, left_out = LOCAL[key]
    if key == (CROSS, 1):
        offer(world.memory, tmp_path)
    names = {"source_kv_cache": world.memory, "listing": listing("source", 90)}
    run(without(world.local(blocks()[key]), left_out), names)
    printed = capsys.readouterr().out
    assert re.search(prints, printed), printed
    assert "None" not in printed
    if key == (MATRIX, 3):
        path = registered / "custom-to-llama3-70b.wmatrix"
        status = awareness_vllm.WMatrixMonitor().check(path.name)
        assert (status.drift_detected, status.accuracy) == (False, None)
        path.unlink()


@pytest.mark.slow
def test_a_published_path_is_neither_loaded_over_nor_composed(world: World) -> None:
    aligner = awareness_vllm.MultiHopMemoryAligner()
    path = aligner.find_optimal_path("gpt-4", "mistral-large")
    assert (path.basis, path.wmatrices, path.path) == ("prior", (), ("GPT-4", "Mistral Large"))
    assert path.estimated_retention == path.optimal_retention == path.direct_retention
    with pytest.raises(BadInput, match="compose"):
        aligner.compose(path)
    longer = aligner.find_optimal_path("gpt-4", "mistral-large", listing("gpt-4", 200_000))
    assert longer.optimal_retention < path.optimal_retention
    with pytest.raises(UnsupportedModel, match="measured"):
        aligner.find_optimal_path("gpt-4", "mistral-large", texts=[Document("a", "b")])
    for memory in (listing("gpt-4o"), world.memory):
        with pytest.raises(UnsupportedModel, match="another model"):
            aligner.find_optimal_path("gpt-4", "mistral-large", memory)
    assert aligner.find_optimal_path("gpt-4", "GPT-4").basis == "exact"


@pytest.mark.slow
def test_a_model_at_hand_has_no_published_path(world: World) -> None:
    aligner = awareness_vllm.MultiHopAligner()
    assert aligner.find_optimal_path("source", "third").basis == "estimated"
    with pytest.raises(BadInput, match="gpt-4"):
        aligner.find_optimal_path("source", "gpt-4")
    with pytest.raises(BadInput, match="Falcon 180B"):
        aligner.find_optimal_path("falcon-180", "phi-3-medium")
    with pytest.raises(BadInput, match="package"):
        aligner.find_optimal_path("source", "third", listing("source"))


def test_the_names_are_exported() -> None:
    imported = {name for code in blocks().values() for name in imports(code)}
    assert imported == set(awareness_vllm.__all__)
    assert awareness_vllm.MultiHopAligner is awareness_vllm.MultiHopMemoryAligner


def imports(code: str) -> list[str]:
    """The names that a block imports from us."""
    (line,) = re.findall(r"^from awareness_vllm import (.*)$", code, re.MULTILINE)
    return line.split(", ")
