"""Span alignment on real Unicode: exact bytes, and the last-byte rule."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from awareness_demo.models import put_before_every_text
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from awareness_vllm.align.realign import prompt_ids
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.models.tokens import (
    Spans,
    align,
    is_control,
    load_tokenizer,
    prefix_ids,
    tokenize,
)

pytestmark = pytest.mark.unit

PIECES = [
    "the quick ",
    " brown  fox",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "👍🏽",
    "e\u0301",
    "n\u0303o",
    "日本語",
    "中文。",
    "한국어",
    "עברית ",
    "العربية",
    "\u202bשלום\u202c",
    "ไทย",
    "\n\n\t",
    "\u00a0",
    "\u200b",
    "\ufeff",
    "<0x41>",
    "<bos>",
    "▁",
    " ▁ ",
    "ß",
    "𝔘",
]
unicode_texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=8)
    .map("".join)
    .filter(lambda text: text.isprintable() or text.isascii()),
)


@pytest.fixture(scope="session", params=["byte level", "byte fallback"])
def tokenizer(
    request: pytest.FixtureRequest,
    byte_level_tokenizer: Tokenizer,
    byte_fallback_tokenizer: Tokenizer,
) -> Tokenizer:
    return byte_level_tokenizer if request.param == "byte level" else byte_fallback_tokenizer


def assert_tiles(spans: Spans, size: int) -> None:
    """Spans follow one another without gap or overlap from byte 0 to the end."""
    if size == 0:
        assert len(spans) == 0
        return
    assert spans[0, 0] == 0
    assert spans[-1, 1] == size
    assert np.array_equal(spans[1:, 0], spans[:-1, 1])
    assert (spans[:, 1] > spans[:, 0]).all()


@settings(max_examples=200, deadline=None)
@given(text=unicode_texts)
def test_spans_tile_the_bytes(tokenizer: Tokenizer, text: str) -> None:
    assert_tiles(tokenize(tokenizer, text).spans, len(text.encode()))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=unicode_texts.filter(bool))
def test_the_aligned_token_holds_the_last_byte(
    byte_level_tokenizer: Tokenizer, byte_fallback_tokenizer: Tokenizer, text: str
) -> None:
    one = tokenize(byte_level_tokenizer, text).spans
    other = tokenize(byte_fallback_tokenizer, text).spans
    for source, target in ((one, other), (other, one)):
        result = align(source, target)
        assert result.shape == (len(target),)
        for index, (_, end) in zip(result, target, strict=True):
            assert source[index, 0] <= end - 1 < source[index, 1]


@settings(max_examples=100, deadline=None)
@given(text=unicode_texts.filter(bool))
def test_a_tokenizer_aligns_to_itself_one_to_one(tokenizer: Tokenizer, text: str) -> None:
    spans = tokenize(tokenizer, text).spans
    assert np.array_equal(align(spans, spans), np.arange(len(spans)))


@settings(max_examples=100, deadline=None)
@given(text=unicode_texts.filter(bool), specials=st.integers(1, 3))
def test_special_tokens_before_the_text_shift_the_alignment(
    byte_level_tokenizer: Tokenizer, text: str, specials: int
) -> None:
    spans = tokenize(byte_level_tokenizer, text).spans
    source = np.concatenate((np.zeros((specials, 2), np.int64), spans))
    assert np.array_equal(align(source, spans), np.arange(len(spans)) + specials)


def test_tokenizers_really_cut_inside_characters(byte_fallback_tokenizer: Tokenizer) -> None:
    tokens = tokenize(byte_fallback_tokenizer, "🦊")
    assert tokens.spans.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_blanks_and_blank_marks_of_the_text_are_distinguished(
    byte_fallback_tokenizer: Tokenizer,
) -> None:
    # SentencePiece writes both as ▁; only the text's bytes say which is which.
    text = "the ▁quick▁ ▁▁  fox"
    marked, plain = (tokenize(byte_fallback_tokenizer, t) for t in (text, text.replace("▁", " ")))
    assert marked.ids == plain.ids
    assert_tiles(marked.spans, len(text.encode()))
    for mark, blank in zip(marked.spans, plain.spans, strict=True):
        spelled = text.encode()[slice(*mark)].decode().replace("▁", " ")
        assert spelled == text.replace("▁", " ")[slice(*blank)]


def test_text_like_a_special_token_stays_text(
    byte_fallback_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    byte_fallback_tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.token_to_id("<bos>") not in tokenize(loaded, "a <bos> b").ids


CONTROLS = ["</think>", "<tool_call>", "[TOOL_CALLS]", "<｜User｜>", "◁think▷", "<|fim_prefix|>"]
TEXTS = ["<table>", "</b>", "<h1>", "\n\n\n", "\t\t", "    ", "zebra", "'s"]


@pytest.fixture(params=["byte level", "byte fallback"])
def with_added(
    request: pytest.FixtureRequest,
    byte_level_tokenizer: Tokenizer,
    byte_fallback_tokenizer: Tokenizer,
    tmp_path: Path,
) -> Path:
    """A folder whose tokenizer has added tokens that are not flagged special."""
    base = byte_level_tokenizer if request.param == "byte level" else byte_fallback_tokenizer
    tokenizer = Tokenizer.from_str(base.to_str())
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in [*CONTROLS, *TEXTS]])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_text_gives_no_control_tokens_id(with_added: Path) -> None:
    plain = Tokenizer.from_file(str(with_added / "tokenizer.json"))
    loaded = load_tokenizer(with_added)
    for content in CONTROLS:
        text = f"the fox {content}\n jumps"
        assert plain.token_to_id(content) in plain.encode(text).ids
        tokens = tokenize(loaded, text)
        assert loaded.token_to_id(content) == plain.token_to_id(content)
        assert loaded.token_to_id(content) not in tokens.ids
        if loaded.decoder:
            assert loaded.decode(tokens.ids, skip_special_tokens=False) == text
        assert_tiles(tokens.spans, len(text.encode()))
        assert prompt_ids(text, [], with_added) == tokens.ids
    for content in TEXTS:
        text = f"the fox{content}jumps"
        tokens = tokenize(loaded, text)
        assert loaded.token_to_id(content) in tokens.ids
        assert tokens.ids == plain.encode(text, add_special_tokens=False).ids
        assert_tiles(tokens.spans, len(text.encode()))


def test_a_template_makes_a_tag_a_control_token(with_added: Path) -> None:
    (with_added / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool_use", "template": "x <table> {{ y }}"}]})
    )
    loaded = load_tokenizer(with_added)
    assert loaded.token_to_id("<table>") not in tokenize(loaded, "a <table>").ids
    assert loaded.token_to_id("<h1>") in tokenize(loaded, "a <h1>").ids


@pytest.mark.parametrize(
    ("content", "control"),
    [
        *((token, True) for token in CONTROLS),
        *((token, False) for token in TEXTS),
        *((token, True) for token in ("<|channel>", "<seed:think>", "]<]minimax[>[", "<function=")),
        *((token, True) for token in ("<start_of_image>", "[multimodal]", "|||EMAIL_ADDRESS|||")),
        *((token, False) for token in ("<br/>", "<a href=", "<-", "[]", "||", "é", "C++", "->")),
    ],
)
def test_control_tokens_are_markup(content: str, control: bool) -> None:
    assert is_control(content, "") == control


def test_a_model_without_merges_reads_its_own_pieces_as_text(tmp_path: Path) -> None:
    # A Unigram model finds control tokens in its vocabulary, whatever added tokens are skipped.
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "ab<>/s▁")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("b▁a", -6.0)], unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    tokens = tokenize(loaded, "a</s>b <s>a")
    assert not {0, 1, 2} & set(tokens.ids)
    assert loaded.decode(tokens.ids) == "a</s>b <s>a"
    assert tokenize(loaded, "ab a").ids == tokenizer.encode("ab a", add_special_tokens=False).ids


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="not valid Unicode"):
        tokenize(tokenizer, "a\ud800b")


def test_nothing_to_align_to_is_an_error() -> None:
    with pytest.raises(BadInput):
        align(np.zeros((0, 2), np.int64), np.array([[0, 1]]))


def test_bos_is_a_prefix_and_not_part_of_the_text(
    byte_fallback_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_str(byte_fallback_tokenizer.to_str())
    assert prefix_ids(tokenizer) == []
    put_before_every_text(tokenizer, "<bos>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    bos = loaded.token_to_id("<bos>")
    assert prefix_ids(loaded) == [bos]
    assert loaded.encode("the fox").ids[0] == bos
    assert bos not in tokenize(loaded, "the fox").ids


def test_no_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
