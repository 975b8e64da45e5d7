"""The whole fit on two tiny random models: nothing of the work is lost or done twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.fit import calibrate, fit, gather, regress
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.texts import (
    CONTEXT_CHARACTERS,
    LONG,
    WINDOW_CHARACTERS,
    calibration_texts,
    shuffled_windows,
)
from awareness_vllm.fit.tokens import TextTokens
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_manifest

pytestmark = pytest.mark.unit

CONFIG = FitConfig(tokens=3000, rank=6, predecessors=1, calibration=5, epochs=2, held_out=0.3)


class Killed(Exception):
    """What a test raises where a real fit would be killed."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and saves so frequent that a small fit has several."""
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    monkeypatch.setattr(fit, "HELD_OUT_TEXTS", 3)
    monkeypatch.setattr(calibrate, "SAVE_EVERY", 1)


def fitted(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    folder: Path | None,
    config: FitConfig = CONFIG,
) -> WMatrix:
    return fit.fit(*tiny_models, anchors, config, folder=folder, progress=False)


def killed_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    original, count = getattr(owner, name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count > calls:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("owner", "name", "calls", "changes"),
    [
        pytest.param(fit.Reader, "pairs", 4, {}, id="while reading anchors"),
        pytest.param(regress, "reduced_rank_ridge", 0, {}, id="before solving"),
        pytest.param(calibrate, "kl_divergence", 7, {}, id="in the first epoch"),
        pytest.param(calibrate, "kl_divergence", 13, {}, id="in the second epoch"),
        pytest.param(calibrate, "kl_divergence", 6, {"batch": 2}, id="with batches"),
        pytest.param(
            regress, "reduced_rank_ridge", 0, {"choice": "best"}, id="with the best layers chosen"
        ),
    ],
)
def test_a_killed_fit_resumes(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    tmp_path: Path,
    owner: object,
    name: str,
    calls: int,
    changes: dict[str, Any],
) -> None:
    config, folder = replace(CONFIG, **changes), tmp_path / "work"
    whole = fitted(tiny_models, anchors, None, config)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, owner, name, calls)
        with pytest.raises(Killed):
            fitted(tiny_models, anchors, folder, config)
    assert folder.is_dir()
    again = fitted(tiny_models, anchors, folder, config)
    assert not folder.exists()
    assert again.manifest == whole.manifest
    for part in calibrate.PARTS:
        torch.testing.assert_close(getattr(again, part), getattr(whole, part))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_finished_steps_are_not_repeated(
    tiny_models: tuple[Path, Path], anchors: list[Document], tmp_path: Path
) -> None:
    read: list[str] = []
    original = fit.Reader.pairs

    def noted(self: fit.Reader, texts: list[TextTokens]) -> object:
        read.extend(text.text for text in texts)
        return original(self, texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.Reader, "pairs", noted)
        killed_after(patch, calibrate, "kl_divergence", 2)
        with pytest.raises(Killed):
            fitted(tiny_models, anchors, tmp_path / "work")
        before = len(read)
        with pytest.raises(Killed):
            fitted(tiny_models, anchors, tmp_path / "work")
    assert before > 4
    assert len(read) == before


def test_another_configuration_starts_anew(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "work", "one").save("a", {"x": torch.ones(2)}, {"n": 1})
    assert Checkpoint(tmp_path / "work", "one").load("a") is not None
    assert Checkpoint(tmp_path / "work", "two").load("a") is None


def test_a_truncated_checkpoint_is_ignored(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "work", "one")
    checkpoint.save("a", {"x": torch.ones(1000)}, {})
    path = tmp_path / "work" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:300])
    assert checkpoint.load("a") is None


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_calibration_returns_the_best_epoch(
    tiny_models: tuple[Path, Path], anchors: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The map before any step is called the best: then nothing of the training may remain.
    scores = iter((0.0, 1.0, 2.0))
    monkeypatch.setattr(calibrate, "mean_kl", lambda *args: next(scores))
    best = fitted(tiny_models, anchors, None)
    plain = fit.fit(*tiny_models, anchors, replace(CONFIG, calibration=0), progress=False)
    for part in calibrate.PARTS:
        assert torch.equal(getattr(best, part), getattr(plain, part))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_calibration_lowers_the_divergence_on_held_out_texts(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores: list[list[float]] = []
    original = fit.calibrate

    def noted(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)
        scores.append(result[1])
        return result

    monkeypatch.setattr(fit, "calibrate", noted)
    config = replace(CONFIG, calibration=12, epochs=3)
    fit.fit(*tiny_models, anchors, config, progress=False)
    assert min(scores[0][1:]) < scores[0][0]


@pytest.mark.usefixtures("small")
def test_texts_with_nan_are_named_and_left_out(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from awareness_vllm.fit import reader

    original = reader.padded_states

    def poisoned(model: torch.nn.Module, texts: list[list[int]]) -> object:
        keys, values = original(model, texts)
        if len(texts[0]) % 2:
            keys[0][:, 3:5] = float("nan")
        return keys, values

    monkeypatch.setattr(reader, "padded_states", poisoned)
    config = replace(CONFIG, calibration=0)
    wmatrix = fit.fit(*tiny_models, anchors, config, progress=False)
    assert wmatrix.decode.isfinite().all()
    assert "NaN or infinite" in caplog.text


def test_calibration_texts_mix_prose_and_recall(anchors: list[Document]) -> None:
    pairs = calibration_texts(anchors, 6, seed=0)
    assert len(pairs) == 6
    prose = {document.text for document in anchors}
    kinds = [any(context in text for text in prose) for context, _ in pairs]
    assert kinds == [True, False] * 3
    other = calibration_texts(anchors, 6, seed=fit.HELD_OUT_SEED)
    assert not {c for c, _ in pairs[1::2]} & {c for c, _ in other[1::2]}


def test_every_other_long_document_gives_long_texts() -> None:
    long = " ".join(f"word{i}" for i in range(4000))
    documents = [Document(f"d{i}", long) for i in range(2)]
    lengths = sorted(len(text) for text in shuffled_windows(documents, 0))
    assert lengths[0] <= 1.1 * WINDOW_CHARACTERS
    assert lengths[-1] >= LONG * WINDOW_CHARACTERS
    contexts = [len(context) for context, _ in calibration_texts(documents, 12, 0)[::2]]
    assert min(contexts) <= CONTEXT_CHARACTERS < LONG * CONTEXT_CHARACTERS - 20 <= max(contexts)
    short = [Document(f"d{i}", long[: 2 * WINDOW_CHARACTERS - 500]) for i in range(2)]
    assert max(len(text) for text in shuffled_windows(short, 0)) <= 1.1 * WINDOW_CHARACTERS


def perturbed(folder: Path, into: Path, noise: float) -> Path:
    """A variant of a model: the same shapes and tokenizer, slightly other weights."""
    shutil.copytree(folder, into)
    path = into / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: w + noise * w.float().std() * torch.randn(w.shape, generator=generator)
        for name, w in load_file(path).items()
    }
    save_file({n: w.bfloat16() for n, w in weights.items()}, path, {"format": "pt"})
    return into


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_variants_map_adds_to_the_sources_states(
    tiny_models: tuple[Path, Path], anchors: list[Document], tmp_path: Path
) -> None:
    variant = perturbed(tiny_models[0], tmp_path / "variant", 0.02)
    config = replace(CONFIG, rank=1, calibration=3, epochs=1)
    wmatrix = fit.fit(tiny_models[0], variant, anchors, config, progress=False)
    assert wmatrix.manifest.residual
    assert wmatrix.manifest.layers == (0, 1, 2, 3)
    # Rank 1 could never say as much by itself.
    assert wmatrix.accuracy > 0.95
    wmatrix.save(tmp_path / "variant.wmatrix")
    assert load(tmp_path / "variant.wmatrix").manifest == read_manifest(
        tmp_path / "variant.wmatrix"
    )

    width = wmatrix.manifest.source_width
    source, masked = torch.randn(3, width), torch.tensor([False, True, False])
    embeddings = torch.zeros(3, len(wmatrix.mean) - width)
    nothing = replace(wmatrix, decode=0 * wmatrix.decode, bias=0 * wmatrix.bias)
    keys, values = nothing.map(source, embeddings, masked)
    best = torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)
    assert torch.equal(best[[0, 2]], source[[0, 2]])
    assert torch.equal(best[1], wmatrix.mean[:width])
    keys, values = nothing.map(None, embeddings)
    assert torch.equal(keys[0].flatten(1)[2], wmatrix.mean[: keys[0][0].numel()])
