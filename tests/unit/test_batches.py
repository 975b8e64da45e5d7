"""Lessons of unequal lengths in one batch: the same losses and gradients as one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from awareness_vllm.fit import calibrate
from awareness_vllm.fit.calibrate import PARTS, kl_divergence, mapped_logits
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.divergence import weighted_divergence
from awareness_vllm.fit.examples import (
    Batch,
    CalibrationExamples,
    LessonTokens,
    lesson_tokens,
    likely_tokens,
)
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.texts import Lesson
from awareness_vllm.fit.tokens import Workers, by_length, pieces
from awareness_vllm.models.hf import states
from awareness_vllm.wmatrix.features import flat_states
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

pytestmark = pytest.mark.unit

RANK = 5
LESSONS = (
    Lesson(
        "the quick brown fox jumps over the lazy dog, and the other dogs",
        " look on, and so do the others",
    ),
    Lesson("the lazy dog and the fox", " jumps over the other dogs, and on", reread=((4, 8),)),
    Lesson("and the other dogs look on. The quick", " fox", reread=((0, 3), (14, 18))),
)


def gemma_like(folder: Path, tokenizer: Tokenizer) -> Path:
    """Windows of 4 tokens in two of three layers, a theta of their own, and logits capped."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        final_logit_softcapping=2.0,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=2,
    )
    torch.manual_seed(1)
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["llama", "gemma"])
def reader(
    request: pytest.FixtureRequest,
    tiny_models: tuple[Path, Path],
    byte_fallback_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Reader:
    target = tiny_models[1]
    if request.param == "gemma":
        target = gemma_like(tmp_path_factory.mktemp("gemma"), byte_fallback_tokenizer)
    reader = Reader(tiny_models[0], target, predecessors=2)
    reader.source_model.float()
    reader.target_model.float()
    return reader


@pytest.fixture(scope="module")
def wmatrix(reader: Reader) -> WMatrix:
    generator = torch.Generator().manual_seed(3)
    features = reader.width + 3 * reader.target_geometry.hidden_size
    outputs = reader.target_geometry.width
    keys, values = states(reader.target_model, reader.sink)
    return WMatrix(
        WMatrixManifest(
            source=reader.source_geometry,
            target=reader.target_geometry,
            layers=reader.layers,
            rank=RANK,
            predecessors=2,
            sink=tuple(reader.sink),
            anchors=Anchors(digest="", documents=0, tokens=0),
            fit={},
            r2={},
            versions={},
        ),
        mean=torch.randn(features, generator=generator),
        scale=torch.rand(features, generator=generator) + 0.5,
        encode=torch.randn(features, RANK, generator=generator) / features**0.5,
        decode=torch.randn(RANK, outputs, generator=generator),
        bias=torch.randn(outputs, generator=generator),
        sink_keys=keys,
        sink_values=values,
    )


def tokens(reader: Reader) -> list[LessonTokens]:
    return [lesson_tokens(reader.tokeniser, lesson) for lesson in LESSONS]


def batch_of(reader: Reader, wmatrix: WMatrix, lessons: list[LessonTokens]) -> Batch:
    examples = CalibrationExamples(reader, wmatrix, LESSONS.__getitem__, len(LESSONS), 1)
    batch = examples.read(lessons)
    return replace(batch, features=batch.features.float())  # so that rounding is no excuse


def loss_and_gradients(
    reader: Reader, wmatrix: WMatrix, batches: list[Batch]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    parts = {name: getattr(wmatrix, name).clone().requires_grad_() for name in PARTS}
    losses = [kl_divergence(wmatrix, reader, parts, batch) for batch in batches]
    loss = torch.stack(losses).mean()
    return loss.detach(), list(torch.autograd.grad(loss, list(parts.values())))


@pytest.mark.parametrize("likely", [3, 10_000])
def test_a_batch_is_its_lessons_one_by_one(
    reader: Reader, wmatrix: WMatrix, likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awareness_vllm.fit.examples.LIKELY", likely)
    lessons = tokens(reader)
    assert len({len(lesson.context) for lesson in lessons}) == 3
    assert len({len(lesson.continuation) for lesson in lessons}) == 3
    single = [batch_of(reader, wmatrix, [lesson]) for lesson in lessons]
    loss, gradients = loss_and_gradients(reader, wmatrix, single)
    batch = batch_of(reader, wmatrix, lessons)
    torch.testing.assert_close(batch.features, torch.cat([own.features for own in single]))
    batched_loss, batched_gradients = loss_and_gradients(reader, wmatrix, [batch])
    assert loss > 1e-3
    torch.testing.assert_close(batched_loss, loss)
    for batched, expected in zip(batched_gradients, gradients, strict=True):
        assert expected.abs().max() > 1e-5
        torch.testing.assert_close(batched, expected, rtol=1e-3, atol=1e-7)


def test_windows_are_met(reader: Reader, wmatrix: WMatrix) -> None:
    # Otherwise the test above says nothing of them.
    windows = [layer.window for layer in reader.target_geometry.layers if layer.window]
    assert all(len(lesson.context) > window for window in windows for lesson in tokens(reader))


def test_memories_of_native_rows_are_native_reading(reader: Reader, wmatrix: WMatrix) -> None:
    lessons = [
        lesson_tokens(reader.tokeniser, replace(lesson, reread=((0, len(lesson.context)),)))
        for lesson in LESSONS
    ]
    batch = replace(batch_of(reader, wmatrix, lessons), tokens=None)
    parts = {name: getattr(wmatrix, name) for name in PARTS}
    logits = mapped_logits(wmatrix, reader, parts, batch)
    for lesson, own in zip(lessons, logits.split([len(ids) for ids in batch.ids]), strict=True):
        ids = torch.tensor([[*lesson.context.ids, *lesson.continuation]])
        native = reader.target_model(ids).logits[0, -len(lesson.continuation) :]
        torch.testing.assert_close(own, native, rtol=1e-4, atol=1e-4)


def test_reread_characters_are_whole_tokens_of_them(reader: Reader) -> None:
    lesson = Lesson("naïve dogs, quick foxes", " on", reread=((6, 10),))
    found = lesson_tokens(reader.tokeniser, lesson)
    raw, spans = lesson.context.encode(), found.context.spans[found.reread]
    assert raw[spans[0, 0] : spans[-1, 1]].decode().strip() == "dogs"


def test_each_lesson_is_judged_by_its_own_tokens() -> None:
    logits = torch.tensor([[9.0, 8, 0, 0], [0, 9.0, 8, 0], [0, 0, 8.0, 9]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("awareness_vllm.fit.examples.LIKELY", 1)
        found, taken = likely_tokens(logits, [2, 1])
    assert found.tolist() == [0, 1, 3]
    assert taken is not None
    assert taken.tolist() == [[True, True, False]] * 2 + [[False, False, True]]


def test_a_saved_batch_comes_back(reader: Reader, wmatrix: WMatrix) -> None:
    batch = batch_of(reader, wmatrix, tokens(reader))
    tensors, note = batch.as_saved()
    again = Batch.restored(dict(tensors), json.loads(json.dumps(note)))
    parts = {name: getattr(wmatrix, name) for name in PARTS}
    losses = [kl_divergence(wmatrix, reader, parts, one) for one in (batch, again)]
    assert torch.equal(*losses)


def double(state: int, number: int) -> int:
    return state * number


@pytest.mark.parametrize("count", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_workers_keep_the_order(count: int) -> None:
    workers = Workers(count, 2)
    assert list(workers.map(double, range(30))) == list(range(0, 60, 2))
    workers.close()


def test_batches_are_of_similar_lengths(reader: Reader) -> None:
    texts = [reader.tokeniser.text("dog " * n) for n in (1, 30, 2, 31, 200)]
    batches = by_length(texts, budget=3 * len(texts[3]))
    assert [sorted(map(texts.index, batch)) for batch in batches] == [[0, 2], [1, 3], [4]] or all(
        len(batch) * max(map(len, batch)) <= 3 * len(texts[3]) or len(batch) == 1
        for batch in batches
    )
    assert sorted(len(text) for batch in batches for text in batch) == sorted(map(len, texts))
    assert list(pieces(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_a_step_needs_nothing_of_the_host(
    reader: Reader, wmatrix: WMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On `meta` tensors have no values, and none may meet one of a CPU: as on a GPU that is not to
    wait, every index is made on the host and carried over."""
    away = Reader(reader.source, reader.target, 2, device="meta")
    # transformers reads the mask, which a GPU waits for once a step.
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *args: True)
    examples = CalibrationExamples(away, wmatrix, LESSONS.__getitem__, 3, 3)
    (batch,) = examples.batches([0])
    assert batch.native.shape[1] == away.target_geometry.vocab_size
    parts = {name: getattr(examples.wmatrix, name).clone().requires_grad_() for name in PARTS}
    loss = kl_divergence(examples.wmatrix, away, parts, batch)
    gradients = torch.autograd.grad(loss, list(parts.values()))
    assert all(gradient.device.type == "meta" for gradient in gradients)


def test_a_calibration_of_minutes_ends_with_them(
    reader: Reader, wmatrix: WMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 1000, 25))
    monkeypatch.setattr(calibrate.time, "monotonic", lambda: float(next(seconds)))
    kept: list[WMatrix] = []
    examples = CalibrationExamples(reader, wmatrix, lambda n: LESSONS[n % 3], None, 1)
    none = CalibrationExamples(reader, wmatrix, LESSONS.__getitem__, 0, 1)
    checkpoint, config = Checkpoint(tmp_path / "work", ""), FitConfig(minutes=4.0)
    trained, _ = calibrate.calibrate(
        wmatrix, examples, none, config, checkpoint, progress=False, snapshot=kept.append
    )
    saved = checkpoint.load("calibration")
    assert saved is not None
    assert 3 <= saved[1]["step"] < 12
    assert 2 <= len(kept) <= 4
    assert not torch.equal(trained.decode, kept[0].decode)
    assert not torch.equal(trained.decode, wmatrix.decode.bfloat16())


@pytest.mark.parametrize("rows", [2, 100])
def test_the_divergence_is_torchs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("awareness_vllm.fit.divergence.ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    logits, native = (torch.randn(7, 11, generator=generator) for _ in range(2))
    weights = torch.rand(7, generator=generator)
    taken = torch.rand(7, 11, generator=generator) < 0.6
    logits.requires_grad_()
    found = weighted_divergence(logits, native, weights, taken)
    masked = (x.masked_fill(~taken, -1e30).log_softmax(-1) for x in (logits, native))
    each = torch.nn.functional.kl_div(*masked, log_target=True, reduction="none").sum(-1)
    expected = (each * weights).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * x, logits) for x in (found, expected)))


def test_position_free_native_states_are_native_reading(reader: Reader) -> None:
    lessons, sink = tokens(reader), len(reader.sink)
    cached = [states(reader.target_model, lesson.context.ids) for lesson in lessons]
    flat = torch.cat([flat_states(reader.target_geometry, *own)[sink:] for own in cached])
    sinks = tuple([state[:sink] for state in part] for part in cached[0])
    lengths = [len(lesson.context) for lesson in lessons]
    continuations = [lesson.continuation for lesson in lessons]
    logits = logits_after(reader, sinks, flat, lengths, continuations)
    for lesson, own in zip(lessons, logits.split([len(c) for c in continuations]), strict=True):
        ids = torch.tensor([[*lesson.context.ids, *lesson.continuation]])
        native = reader.target_model(ids).logits[0, -len(lesson.continuation) :]
        torch.testing.assert_close(own, native, rtol=1e-4, atol=1e-4)
