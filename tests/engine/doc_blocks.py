"""The fenced blocks, shell commands and inline code of README, CONTRIBUTING and docs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVER = "localhost:8000"
MEMORY = "mem_…"
"""What stands for an ID in JSON and Python; in a shell it is `$memory`."""

FENCED = re.compile(r"^```(?P<language>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
KEYWORDS = frozenset({"until", "do", "done", "time"})
ASSIGNED = re.compile(r"\w+=(\$\((?P<inner>.*)\))?.*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block; `line` is that of its fence."""

    page: str
    line: int
    language: str
    text: str

    @property
    def live(self) -> bool:
        """Whether it talks to a running server: tests/engine/test_docs.py runs it."""
        return SERVER in self.text

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(*languages: str, page: str | None = None) -> list[Block]:
    """All blocks, or those of some languages or of one page."""
    found = []
    for path in PAGES:
        text = path.read_text("utf-8")
        for match in FENCED.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(name_of(path), line, match["language"], match["text"]))
    return [
        block
        for block in found
        if (not languages or block.language in languages) and page in (None, block.page)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub("", page.read_text("utf-8"))


def inline(page: Path) -> list[str]:
    """The pieces of inline code of a page, each on one line."""
    return [" ".join(match.split()) for match in INLINE.findall(prose(page))]


def logical_lines(script: str) -> Iterator[str]:
    """A script's lines; those that a backslash or an open quote continues are one."""
    pending = ""
    for line in script.splitlines():
        pending += line
        try:
            shlex.split(pending, comments=True)
        except ValueError:  # a quote is open, or the line ends with a backslash
            pending = pending.removesuffix("\\") + "\n" * (not pending.endswith("\\"))
            continue
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\")
            continue
        if pending.strip():
            yield pending
        pending = ""
    assert not pending, f"a quote stays open: {pending!r}"


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a script, as words; `$(…)` of an assignment is taken for its own."""
    for line in logical_lines(script):
        assigned = ASSIGNED.fullmatch(line)
        if assigned and assigned["inner"]:
            yield from commands(assigned["inner"])
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set(";&|"):
                if words := without_prefix(words):
                    yield words
                words = []
            else:
                words.append(word)


def without_prefix(words: list[str]) -> list[str]:
    """A command without assignments, keywords and redirections."""
    if ">" in words:
        words = words[: words.index(">")]
    while words and (words[0] in KEYWORDS or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    return words
