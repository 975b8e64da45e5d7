"""Documents from files and folders: cleaned, de-duplicated, in windows, split for a hold-out.

Texts of an evaluation must never have been fitted on, so `split` goes by whole documents.
"""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.anchors.html import html_to_text
from awareness_vllm.errors import BadInput, escaped

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({"", ".txt", ".md", ".rst", ".html", ".htm", ".pod", ".py"})
MINIMUM = 200


@dataclass(frozen=True)
class Document:
    """A text, with its origin as `name`, which decides its side of a split."""

    name: str
    text: str


def load(paths: Iterable[Path]) -> list[Document]:
    """The documents of files and folders (recursive, sorted), each text once.

    A document's name is the file's path from its folder's own name on, so that it does not depend
    on the folder's location. Documents under 200 characters are dropped; files that are not text
    are skipped with a warning.

    Raises:
        BadInput: a path does not exist, or there is no document at all.
    """
    paths = [Path(path) for path in paths]
    documents: list[Document] = []
    seen: set[str] = set()
    for path, name in _files(paths):
        raw = _read(path)
        if raw is None:
            continue
        text = tidy(html_to_text(raw) if path.suffix.lower() in (".html", ".htm") else raw)
        key = text_digest(text)
        if len(text) >= MINIMUM and key not in seen:
            seen.add(key)
            documents.append(Document(name, text))
    if not documents:
        raise BadInput(
            "no texts",
            found=f"nothing usable in {', '.join(map(str, paths)) or 'no paths'}",
            expected=f"text files ({' '.join(sorted(SUFFIXES - {''}))}, or without a suffix) "
            f"of at least {MINIMUM} characters",
        )
    return documents


def windows(document: Document, characters: int) -> list[str]:
    """Consecutive pieces of about `characters` characters, split at whitespace.

    A last piece of less than a quarter of that is dropped. A run without whitespace is split where
    it would double a piece.

    Raises:
        BadInput: `characters` is not positive.
    """
    if characters < 1:
        raise BadInput("windows need a length", found=characters, expected="a positive number")
    text, start = document.text.strip(), 0
    pieces: list[str] = []
    while len(text) - start > characters:
        space = re.compile(r"\s").search(text, start + characters, start + 2 * characters)
        end = space.start() if space else min(start + 2 * characters, len(text))
        pieces.append(text[start:end])
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
    if 4 * len(text[start:]) >= characters:
        pieces.append(text[start:])
    return [piece for piece in pieces if piece]


def split(
    documents: Iterable[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """The training and the held-out documents, about `fraction` of them held out.

    A document's side depends on its name and the seed alone, not on other documents.

    Raises:
        BadInput: `fraction` is not within [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise BadInput("cannot split", found=fraction, expected="a fraction from 0 to 1")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        value = hashlib.sha256(f"{seed}\n{document.name}".encode("utf-8", "surrogateescape"))
        share = int.from_bytes(value.digest()[:8], "big") / 2**64
        (held_out if share < fraction else train).append(document)
    return train, held_out


def digest(documents: Iterable[Document]) -> str:
    """sha256, in hex, of documents' names and texts in any order."""
    parts = sorted(
        hashlib.sha256(
            f"{len(d.name)} {d.name}\n{d.text}".encode("utf-8", "surrogateescape")
        ).hexdigest()
        for d in documents
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def sources(documents: Iterable[Document]) -> tuple[str, ...]:
    """The folders and files that documents were loaded from, by name, in the order of `load`."""
    return tuple(dict.fromkeys(re.sub(r"/.*|#\d+$", "", d.name) for d in documents))


def text_digest(text: str) -> str:
    """sha256, in hex, of a text's words, whatever its case, spacing and Unicode composition."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(words.encode()).hexdigest()


def tidy(text: str) -> str:
    """A text with runs of blanks and of empty lines collapsed; indentation stays, tabs as four
    blanks, because it has a meaning in code and lists."""
    lines = []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").expandtabs(4).split("\n"):
        body = line.strip()
        indent = len(line) - len(line.lstrip())
        lines.append(" " * min(indent, 24) + re.sub(r"[^\S\n]+", " ", body) if body else "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n").rstrip()


def _files(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Files to read, with their documents' names, without hidden files and unknown suffixes."""
    for path in paths:
        if path.is_file():
            yield path, path.name
        elif path.is_dir():
            folder = path.resolve().name
            for file in sorted(path.rglob("*")):
                below = file.relative_to(path)
                hidden = any(part.startswith(".") for part in below.parts)
                if not hidden and file.suffix.lower() in SUFFIXES and file.is_file():
                    yield file, f"{folder}/{below.as_posix()}"
        else:
            raise BadInput(
                f"cannot read texts from {path}",
                found="no such file or folder",
                expected="a text file or a folder of text files",
                remedy="check the path; `make anchors` installs the default anchors",
            )


def _read(path: Path) -> str | None:
    """A file's text, in UTF-8 or clean Latin-1; None, with a warning, for anything else."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = raw.decode("latin-1")
        if not _is_clean(text):
            logger.warning("skipped %s: not UTF-8 text (%s)", escaped(str(path)), error)
            return None
    if "\0" in text:
        logger.warning("skipped %s: holds NUL bytes", escaped(str(path)))
        return None
    return text


def _is_clean(text: str) -> bool:
    """Whether a Latin-1 decoding has no control characters but whitespace."""
    return not any(unicodedata.category(c) == "Cc" and c not in "\t\n\r\f" for c in text)
