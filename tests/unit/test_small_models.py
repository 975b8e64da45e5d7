"""The small models' training, and the table of encodings that is measured between them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from awareness_vllm.evaluate.evaluate import TextFigures
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.models.describe import from_config
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import load_tokenizer, prefix_ids, tokenize

pytestmark = [pytest.mark.unit, pytest.mark.nightly]


def benchmark(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small = benchmark("small_models")
conversions = benchmark("conversions")
CORPUS = np.arange(1, 3000)
COURSE = small.Course(phases=((4, 16, 0.1), (4, 32, 0.5)), batch=64, warm_up=2, save_every=3)


def geometry(name: str) -> Geometry:
    config = small.RECIPES[name]().to_dict()
    return from_config(config, name=name, weights="w", tokenizer="t")


@pytest.mark.parametrize(
    ("name", "scheme", "window"),
    [
        ("target", "rope", None),
        ("rope", "rope", None),
        ("learned", "learned", None),
        ("alibi", "alibi", None),
        ("window", "rope", small.WINDOW),
    ],
)
def test_every_encoding_has_its_model(name: str, scheme: str, window: int | None) -> None:
    result = {(layer.positions.scheme, layer.window) for layer in geometry(name).layers}
    assert result == {(scheme, window)}


def test_the_two_rotary_models_differ_in_their_frequencies() -> None:
    one, other = (geometry(name).layers[0].positions.theta for name in ("rope", "target"))
    assert one != other


@pytest.mark.parametrize("plain", [0.0, 1.0])
def test_a_sequence_quotes_itself_unless_it_is_plain(plain: float) -> None:
    ids = small.sequence(np.random.default_rng(0), CORPUS, 256, plain)
    assert len(ids) == 256
    assert ids[0] == 0
    assert (len(set(ids)) < 200) == (plain == 0.0)


def test_a_course_goes_through_its_phases() -> None:
    assert [COURSE.phase(step) for step in (0, 3, 4, 7)] == [(16, 0.1)] * 2 + [(32, 0.5)] * 2
    assert COURSE.steps == 8
    assert COURSE.share(0) == 1 / COURSE.warm_up
    assert COURSE.share(7) < COURSE.share(4)


def test_learned_positions_begin_as_waves() -> None:
    model = tiny()
    small.begin_as_waves(model)
    table = model.transformer.wpe.weight
    products = table[1:] @ table[:-1].T
    torch.testing.assert_close(products.diagonal(), products[0, 0].expand(31))
    size = model.get_input_embeddings().weight.std()
    torch.testing.assert_close(table.square().mean().sqrt(), 2 * size)


def tiny() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 3000}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **off))


def test_a_killed_training_gives_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tiny(), tiny()
    small.train(one, CORPUS, COURSE, 1, Checkpoint(tmp_path / "one", "k"))
    checkpoint, plain = Checkpoint(tmp_path / "other", "k"), small.sequence
    calls = iter(range(16))

    def until_killed(*args: object) -> list[int]:
        if next(calls) == 15:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(small, "sequence", until_killed)
    with pytest.raises(KeyboardInterrupt):
        small.train(other, CORPUS, COURSE, 1, checkpoint)
    monkeypatch.setattr(small, "sequence", plain)
    again = tiny()
    small.train(again, CORPUS, COURSE, 1, checkpoint)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_tokenizer_puts_its_bos_first(tmp_path: Path) -> None:
    small.bpe(["some words of a text"] * 3).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert prefix_ids(tokenizer) == [0]
    assert tokenize(tokenizer, "some wörds").spans[-1, 1] == len("some wörds".encode())


def figures(lost: float) -> TextFigures:
    rng = np.random.default_rng(0)
    native, none = rng.random(40), 3 + rng.random(40)
    nll = {"native": native, "none": none, "memory": native + lost * (none - native)}
    nll |= {"tokens_only": none, "wrong_memory": none}
    names = [f"{conversions.KINDS[i % 2]}/{i}" for i in range(40)]
    return TextFigures(names, {arm: np.stack([x, x, x], 1) for arm, x in nll.items()})


def test_an_impact_is_the_relative_loss_of_retention() -> None:
    result = conversions.impact(figures(0.28), figures(0.1))
    assert result["mean"] == pytest.approx(0.2)
    assert result["ci_low"] == pytest.approx(result["ci_high"])


def test_the_table_says_what_is_measured_and_what_is_published() -> None:
    reference = figures(0.1)
    rows = {"alibi": conversions.row("alibi", figures(0.28), reference)}
    line = conversions.markdown(rows).splitlines()[-1]
    assert "ALiBi → RoPE" in line
    assert "0.720" in line
    assert "20.0%" in line
    assert line.endswith("≤ 5% | 3–5 |")


def test_quotes_are_the_texts_own_words() -> None:
    text = " ".join(f"w{i}" for i in range(200))
    result = conversions.quotes(text, "name")
    assert all(quote[1:] in text for quote in result)
    assert result == conversions.quotes(text, "name") != conversions.quotes(text, "other")
