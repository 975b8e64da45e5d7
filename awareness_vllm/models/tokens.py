"""Tokens with byte spans, and the span alignment of two tokenizers.

The source token that has the information of a target token is the one with its **last** byte. Spans
are byte ranges of the UTF-8 text, so that tokenizers that split characters can be aligned too.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from awareness_vllm.errors import BadInput
from awareness_vllm.models.folder import chat_templates, unreadable

Spans = npt.NDArray[np.int64]

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")

MARKUP = re.compile(r"[<>\[\]{}|｜◁▷]\W*\w.*", re.DOTALL)
"""How control tokens are spelled: a bracket, then a word (`</think>`, `[TOOL_CALLS]`)."""
HTML_TAG = re.compile(
    r"</?(a|article|aside|b|bbox|blockquote|body|br|button|caption|center|cite|code|col|colgroup|dd"
    r"|del|details|div|dl|dt|em|figcaption|figure|font|footer|form|h[1-6]|head|header|hr|html|i"
    r"|iframe|img|input|ins|kbd|label|li|link|main|mark|meta|nav|ol|option|p|pre|q|s|samp|script"
    r"|section|select|small|span|strike|strong|style|sub|summary|sup|svg|table|tbody|td|textarea"
    r"|tfoot|th|thead|title|tr|tt|u|ul|var|video)\b[^>]*>?"
)
"""Tags of HTML, which texts are meant to hold; `bbox` is Gemma's own among them."""


@dataclass(frozen=True)
class Tokens:
    """Token ids and their byte spans in the text, [T] and [T, 2]; special tokens span (0, 0)."""

    ids: list[int]
    spans: Spans


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; a text that spells a control token stays text.

    Control tokens are the special ones and those that `is_control` names.

    Raises:
        UnsupportedModel: no readable tokenizer.json.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise unreadable(path, error, "a fast tokenizer (tokenizer.json)") from error
    _read_control_tokens_as_text(tokenizer, chat_templates(Path(folder)))
    return tokenizer


def is_control(content: str, templates: str) -> bool:
    """Whether an added token that is not flagged special controls the model all the same.

    Reasoning and tool parsers split an answer at such tokens by their id. They are spelled as
    markup; words, blanks and line ends are text, and so are HTML tags, unless one of the model's
    chat `templates` writes them.
    """
    if not MARKUP.fullmatch(content):
        return False
    return not HTML_TAG.fullmatch(content) or content in templates


def _read_control_tokens_as_text(tokenizer: Tokenizer, templates: str) -> None:
    """Have a tokenizer split what spells a control token as it splits any other text.

    Ids stay: `encode_special_tokens` skips special tokens, so the others become special ones.
    """
    added = tokenizer.get_added_tokens_decoder()
    others = [token for token in added.values() if not token.special]
    controls = [token for token in others if is_control(token.content, templates)]
    tokenizer.add_special_tokens([_special(token) for token in controls])
    tokenizer.encode_special_tokens = True
    # A model that does not merge finds whole words in its vocabulary, control tokens too: there
    # the first character is split off.
    if type(tokenizer.model).__name__ == "BPE":
        return
    contents = [t.content for t in added.values() if t.special] + [t.content for t in controls]
    whole = [c for c in contents if len(c) > 1 and tokenizer.model.token_to_id(c) is not None]
    if whole:
        spelled = "|".join(f"{re.escape(c[0])}(?={re.escape(c[1:])})" for c in whole)
        parts = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer else []
        cut = pre_tokenizers.Split(Regex(spelled), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, cut])


def _special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def prefix_ids(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before any text, such as BOS."""
    return list(tokenizer.encode("", add_special_tokens=True).ids)


def tokenize(tokenizer: Tokenizer, text: str) -> Tokens:
    """The tokens of a text with exact byte spans, without special tokens.

    Raises:
        BadInput: the text is not valid Unicode (lone surrogates).
    """
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            "the text is not valid Unicode", found=str(error), expected="text that UTF-8 can encode"
        ) from error
    encoding = tokenizer.encode(text, add_special_tokens=False)
    spans = _spans_from_pieces(encoding.tokens, raw)
    if spans is None:
        spans = _spans_from_offsets(encoding.offsets, text)
    return Tokens(list(encoding.ids), spans)


def align(source: Spans, target: Spans) -> npt.NDArray[np.int64]:
    """For each target token, the index of the source token that has its last byte.

    Args:
        source: [S, 2] byte spans in order; (0, 0) for special tokens.
        target: [T, 2] byte spans.

    Returns:
        [T] indices into source; for a target token of no bytes, the first source token with bytes.

    Raises:
        BadInput: no source tokens.
    """
    if not len(source):
        raise BadInput("no tokens to align to", found="an empty source", expected="at least one")
    last = np.maximum(target[:, 1] - 1, target[:, 0])
    ends = np.maximum.accumulate(source[:, 1])
    return np.minimum(np.searchsorted(ends, last, side="right"), len(source) - 1)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The byte of each character of byte-level BPE (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def _spans_from_pieces(pieces: list[str], raw: bytes) -> Spans | None:
    """Exact spans [T, 2] where the pieces spell the text byte by byte, otherwise None."""
    for spell in (_spell_byte_level, _spell_sentencepiece):
        ends = [0]
        for piece in pieces:
            spelled = spell(piece, raw, ends[-1])
            if spelled is None or not raw.startswith(spelled, ends[-1]):
                break
            ends.append(ends[-1] + len(spelled))
        else:
            if ends[-1] == len(raw):
                return np.stack((ends[:-1], ends[1:]), axis=1).astype(np.int64)
    return None


def _spell_byte_level(piece: str, raw: bytes, begin: int) -> bytes | None:
    """The bytes of a piece; None where a character is not of the alphabet."""
    alphabet = _byte_alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else None


def _spell_sentencepiece(piece: str, raw: bytes, begin: int) -> bytes | None:
    """The bytes of a piece. ▁ stands for a blank or for itself: the text at `begin` decides."""
    if match := BYTE_FALLBACK.fullmatch(piece):
        return bytes((int(match[1], 16),))
    spelled = b""
    for part in re.split("(▁)", piece):
        blank = part == "▁" and raw.startswith(b" ", begin + len(spelled))
        spelled += b" " if blank else part.encode("utf-8", "surrogatepass")
    return spelled


def _spans_from_offsets(offsets: list[tuple[int, int]], text: str) -> Spans:
    """Spans [T, 2] from character offsets: tokens that share a character share its bytes."""
    starts = np.concatenate(([0], np.cumsum([len(c.encode()) for c in text], dtype=np.int64)))
    chars = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    return starts[chars].astype(np.int64)
