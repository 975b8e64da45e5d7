"""`KVCacheAligner`: the published names, and a quality that somebody has measured or none."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from awareness_vllm import KVCacheAligner
from awareness_vllm.aligners import aligner as cache_module
from awareness_vllm.aligners.training_free import TrainingFreeWarning
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import NoWMatrix, QualityUnreachable, UnsupportedModel
from awareness_vllm.evaluate.evaluate import TextFigures
from awareness_vllm.files import file_digest
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "The quick brown fox jumps over the lazy dog, and the other dogs look on. " * 2
Models = tuple[Path, Path]
KEPT = ((100, 0, 0.8), (100, 8, 0.9), (1000, 0, 0.5))


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1}


def certificate() -> dict[str, Any]:
    """As if it had been measured, `KEPT`: context, tail, retention."""
    plans = [
        {
            "context": context,
            "tail": tail,
            "cost": 0.1 + tail / 100,
            "retention": interval(kept),
            "kinds": {},
            "top1": 0.5,
            "tokens_only": interval(0),
        }
        for context, tail, kept in KEPT
    ]
    document = {
        "protocol": {"texts": "", "cases": "", "limit": 8, "context": 100, "continuation": 60},
        **{name: {} for name in ("texts", "cases", "facts_kinds", "facts_distances")},
        "counts": {"texts": 8},
        **{name: interval(0.8) for name in ("retention", "margin", "facts", "facts_margin")},
        **{"metrics": None, "plans": plans, "tier": None, "measured": "2026-11-23"},
        **{"hardware": "", "versions": {}},
    }
    return Certificate.model_validate(document).model_dump(mode="json")


@pytest.fixture(scope="module")
def maps(fitted: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same fitted map without a certificate, and with one."""
    root = tmp_path_factory.mktemp("maps")
    manifest = fitted.manifest.model_copy(update={"certificate": certificate()})
    fitted.save(root / "plain" / "pair.wmatrix")
    replace(fitted, manifest=manifest).save(root / "certified" / "pair.wmatrix")
    return root / "plain", root / "certified" / "pair.wmatrix"


@pytest.fixture(scope="module")
def memory(tiny_models: Models) -> Package:
    return capture(tiny_models[0], TEXT)


@pytest.mark.slow
def test_the_import_is_light_and_the_names_are_there() -> None:
    script = """
import sys
import awareness_vllm
assert not {"torch", "vllm", "transformers"} & set(sys.modules)
from awareness_vllm import KVCacheAligner
assert "vllm" not in sys.modules
try:
    awareness_vllm.Nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "Nothing" in done.stdout, done.stderr


def test_without_a_certificate_no_quality_is_claimed(
    tiny_models: Models, maps: tuple[Path, Path], memory: Package
) -> None:
    aligner = KVCacheAligner(*tiny_models, wmatrix=maps[0])
    state = aligner.align(memory)
    assert (state.quality_score, state.interval, state.basis, state.tail) == (None, None, None, 0)
    with pytest.raises(QualityUnreachable, match="never measured") as caught:
        aligner.align(memory, quality_target=0.1)
    assert caught.value.best is None


def test_the_certificate_gives_quality_and_plan(
    tiny_models: Models, maps: tuple[Path, Path], memory: Package, tmp_path: Path
) -> None:
    aligner = KVCacheAligner(*tiny_models, wmatrix=maps[1], store=tmp_path)
    plain = aligner.align(memory)
    assert (plain.quality_score, plain.tail) == (0.8, 0)
    assert plain.basis == cache_module.Basis("measured", file_digest(maps[1]), 100)
    path = publish(memory, tmp_path)
    better = aligner.align(kv_cache=path.stem, quality_target=0.85)
    assert (better.quality_score, better.tail) == (0.9, 8)
    assert better.interval is not None
    assert better.interval.ci_low == pytest.approx(0.8)
    # All but the tail is the same map's; the tail is what the target makes of it after the rest.
    for one, other in zip(plain.keys + plain.values, better.keys + better.values, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one[:-8], other[:-8])
    assert not torch.equal(plain.values[1][-8:], better.values[1][-8:])
    native = states(load_model(tiny_models[1]), better.ids)
    # Its first layer reads tokens alone.
    torch.testing.assert_close(
        better.values[0][-8:].float(), native[1][0][-8:], atol=1e-2, rtol=1e-2
    )
    assert aligner.align(path, quality_target=0.85).tail == 8


def test_a_quality_out_of_reach_names_the_best_and_what_would_reach_it(
    tiny_models: Models, maps: tuple[Path, Path], memory: Package
) -> None:
    aligner = KVCacheAligner(*tiny_models, wmatrix=maps[1])
    with pytest.raises(QualityUnreachable, match=r"0\.900, with the last 8.*fit a bett") as caught:
        aligner.align(memory, quality_target=0.95)
    assert caught.value.best == 0.9


def test_quality_is_measured_on_the_spot_where_texts_are_given(
    tiny_models: Models,
    maps: tuple[Path, Path],
    memory: Package,
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {}

    def measured(harness: object, texts: object, **given: Any) -> TextFigures:
        asked.update(given)
        nll = {"native": 1.0, "memory": 1.6, "none": 2.0}
        return TextFigures(["a", "b"], {arm: np.full((2, 3), x) for arm, x in nll.items()})

    monkeypatch.setattr(cache_module, "evaluate_texts", measured)
    aligner = KVCacheAligner(*tiny_models, wmatrix=maps[1])
    state = aligner.align(memory, texts=anchors, limit=3)
    assert state.quality_score == pytest.approx(0.4)
    assert state.basis is not None
    assert state.basis.context == asked["context"] == len(state.ids) - 1
    assert asked["limit"] == 3
    with pytest.raises(QualityUnreachable, match="at most 8 texts") as caught:
        aligner.align(memory, quality_target=0.5, texts=anchors)
    assert caught.value.best == pytest.approx(0.4)


def test_the_same_model_is_a_copy(tiny_models: Models, memory: Package) -> None:
    state = KVCacheAligner(tiny_models[0], tiny_models[0]).align(memory, quality_target=1.0)
    assert (state.quality_score, state.basis and state.basis.kind) == (1.0, "exact")
    assert all(torch.equal(a, b) for a, b in zip(state.keys, memory.keys, strict=True))


def test_identity_onto_the_same_model_gives_its_states(tiny_models: Models) -> None:
    """The tokenizer's text begins after a first token that the sink stands for."""
    source = tiny_models[0]
    memory = capture(source, TEXT)
    aligner = KVCacheAligner(source, source).configure(head_mapping="identity")
    with pytest.warns(TrainingFreeWarning):
        state = aligner.align(memory)
    # The sink is put before the text: everything stands one position later, values as they were.
    assert len(state.ids) == len(memory.tokens) + 1
    for found, own in zip(state.values, memory.values, strict=True):
        assert torch.equal(found[2:], own[1:])


def test_training_free_says_so_and_has_no_quality(
    tiny_models: Models, maps: tuple[Path, Path], memory: Package
) -> None:
    aligner = KVCacheAligner(*tiny_models, wmatrix=maps[1]).configure(
        head_mapping="uniform", merge_strategy="mean", split_strategy="repeat"
    )
    with pytest.warns(TrainingFreeWarning, match="not measured between these models"):
        state = aligner.align(memory)
    assert state.quality_score is None
    with (
        pytest.warns(TrainingFreeWarning),
        pytest.raises(QualityUnreachable, match="never measured"),
    ):
        aligner.align(memory, quality_target=0.5)
    with pytest.warns(TrainingFreeWarning):
        assert "layer 1 head 2 value" in aligner.head_mapping_summary()


def test_the_summary_of_a_learned_map_is_a_table(
    tiny_models: Models, maps: tuple[Path, Path]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingFreeWarning)
        text = KVCacheAligner(*tiny_models, wmatrix=maps[0]).head_mapping_summary(top=2)
    lines = text.splitlines()
    assert len(lines) == 12
    assert lines[0].startswith("layer 0 head 0 key")
    assert "(tokens " in lines[0]
    assert lines[0].count("%") == 3


def test_what_cannot_be_mapped_is_refused(
    tiny_models: Models, maps: tuple[Path, Path], memory: Package, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="heads=2 in the source, heads=3 in the target"):
        KVCacheAligner(*tiny_models).configure(head_mapping="identity")
    with pytest.raises(UnsupportedModel, match="another model than this aligner's source"):
        KVCacheAligner(tiny_models[1], tiny_models[0]).align(memory)
    back = KVCacheAligner(tiny_models[1], tiny_models[0], wmatrix=maps[1])
    with pytest.raises(NoWMatrix, match=r"source → target \(pair.wmatrix\)"):
        back.align(capture(tiny_models[1], TEXT))
    with pytest.raises(NoWMatrix, match="no W-Matrix at all"):
        KVCacheAligner(*tiny_models, wmatrix=tmp_path).align(memory)
