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
from tokenizers import Tokenizer

from awareness_vllm.errors import BadInput, UnsupportedModel

Spans = npt.NDArray[np.int64]

BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Tokens:
    """Token ids and their byte spans in the text, [T] and [T, 2]; special tokens span (0, 0)."""

    ids: list[int]
    spans: Spans


@functools.lru_cache(maxsize=8)
def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; text that looks like a special token stays text.

    Raises:
        UnsupportedModel: no readable tokenizer.json.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UnsupportedModel(
            f"cannot read {path}",
            found=str(error),
            expected="a fast tokenizer (tokenizer.json)",
        ) from error
    tokenizer.encode_special_tokens = True
    return tokenizer


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
