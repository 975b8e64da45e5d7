"""Both directions' maps and the attention experiment on a GPU that is lent for minutes.

    PYTHONPATH=.:kernels:demo python3 benchmarks/gpu_fit.py --models DIR --anchors DIR \
        --held-out DIR --out "$OUT" --minutes 3 2 2

Each phase leaves what it has under `--out`, so that a run that is killed costs the rest alone: maps
in int8, before calibration and about once a minute of it, `figures.json`, and what this prints in
`log.txt`. Figures are on half of the needles (even ones) and on held-out texts: good for choosing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Lengths differ from step to step: otherwise each needs other blocks of memory, up to all there is.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch
from torch import Tensor

from awareness_vllm.anchors.corpus import Document, load
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.evaluate import join_documents, sample_evenly
from awareness_vllm.fit.calibrate import PARTS, mapped_logits
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.examples import Batch, CalibrationExamples, LessonTokens
from awareness_vllm.fit.examples import lesson_tokens as tokens_of_lesson
from awareness_vllm.fit.fit import fit
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.texts import Lesson
from awareness_vllm.fit.tokens import pieces
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

Mapped = Callable[[Batch], Tensor]
"""The logits after the mapped memories of a batch."""
PAIR = ("smollm2-135m", "gemma3-270m")
CONTINUATION = 60
CHARACTERS = 5
"""Characters of a token, at most, by which long texts are found."""
LENGTHS = (300, 2000)
TOKENS_AT_ONCE = 16_384
"""Context tokens of a batch of the evaluation."""
STARTED = time.perf_counter()


class Tee:
    """stderr, and a file that has all of it."""

    def __init__(self, path: Path) -> None:
        self.file, self.stream = path.open("a"), sys.stderr

    def write(self, text: str) -> int:
        self.file.write(text)
        self.file.flush()
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False


def say(line: str) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {line}", file=sys.stderr, flush=True)


def figures(out: Path, name: str, found: dict[str, Any]) -> None:
    """Add figures to `figures.json` under a name."""
    path = out / "figures.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: found}, indent=1))


def excerpts(
    reader: Reader, documents: Sequence[Document], length: int, limit: int
) -> list[LessonTokens]:
    """At most `limit` contexts of `length` target tokens, and the tokens that follow each."""
    tokenizer, lessons = load_tokenizer(str(reader.target)), []
    long = [d for d in documents if len(d.text) > CHARACTERS * (length + CONTINUATION)]
    for document in sample_evenly(long, limit):
        tokens = tokenize(tokenizer, document.text)
        if len(tokens.ids) < length + CONTINUATION + 1:
            continue
        end = int(tokens.spans[length - 1, 1])
        context = reader.tokeniser.text(document.text.encode()[:end].decode(errors="ignore"))
        follow = tokens.ids[length : length + CONTINUATION + 1]
        lessons.append(LessonTokens(context, follow, np.empty(0, np.int64)))
    return lessons


def needles(path: Path, length: int) -> list[dict[str, Any]]:
    """The even cases of a length."""
    cases = [json.loads(line) for line in path.read_text().splitlines()][::2]
    return [case for case in cases if case["tokens"] == length]


def arms(reader: Reader, wmatrix: WMatrix, mapped: Mapped, batch: Batch) -> dict[str, Tensor]:
    """Logits after native reading, the map, the map with what is re-read, and nothing."""
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    nothing = torch.zeros(0, reader.target_geometry.width, device=reader.device)
    alone = replace(batch, reread=None)
    found = {
        "native": batch.native,
        "memory": mapped(alone),
        "none": logits_after(reader, sinks, nothing, [0] * len(batch.ids), batch.ids),
    }
    if batch.reread is not None:
        found["re-read"] = mapped(batch)
    return found


@torch.no_grad()
def evaluate(
    reader: Reader,
    wmatrix: WMatrix,
    held_out: Path,
    limits: Sequence[int],
    length: int,
    mapped: Mapped | None = None,
) -> dict[str, Any]:
    """Retention of texts and exact matches of needles at a length of contexts."""
    examples = CalibrationExamples(reader, wmatrix, no_lesson, 0, 1, whole=True)
    wmatrix = examples.wmatrix
    parts = {name: getattr(wmatrix, name) for name in PARTS}
    mapped = mapped or functools.partial(mapped_logits, wmatrix, reader, parts)
    size = max(1, TOKENS_AT_ONCE // length)
    folders = [held_out / name for name in ("crawl", "debian-history", "wordnet")]
    documents = load([folder for folder in folders if folder.is_dir()])
    if length > 500:
        documents = join_documents(documents, length + CONTINUATION)
    texts = excerpts(reader, documents, length, limits[0])
    nll: dict[str, list[float]] = {}
    for lessons in pieces(texts, size):
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, mapped, batch).items():
            for own, ids in by_lesson(logits, batch.ids):
                labels = torch.tensor(ids[1:], device=own.device)
                loss = torch.nn.functional.cross_entropy(own[:-1].float(), labels)
                nll.setdefault(name, []).append(loss.item())
    found: dict[str, Any] = {}  # of texts, then of needles
    if len(texts) > 1:
        losses = {name: np.array(values) for name, values in nll.items()}
        found["retention"] = retention(losses["native"], losses["memory"], losses["none"])
    cases = sample_evenly(needles(held_out / "needles" / "cases.jsonl", length), limits[1])
    exact: dict[str, list[bool]] = {}
    for some in pieces(cases, size):
        lessons, counts = zip(*(case_tokens(reader, case) for case in some), strict=True)
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, mapped, batch).items():
            for (own, ids), count in zip(by_lesson(logits, batch.ids), counts, strict=True):
                labels = torch.tensor(ids[-count:], device=own.device)
                hit = bool((own[-count - 1 : -1].argmax(-1) == labels).all())
                exact.setdefault(name, []).append(hit)
    kinds = np.array([case["kind"] for case in cases])
    found["facts"] = {name: float(np.mean(hits)) for name, hits in exact.items()}
    found["kinds"] = {
        kind: {name: float(np.array(hits)[kinds == kind].mean()) for name, hits in exact.items()}
        for kind in dict.fromkeys(kinds.tolist())
    }
    return found


def by_lesson(logits: Tensor, ids: list[list[int]]) -> list[tuple[Tensor, list[int]]]:
    return list(zip(logits.split([len(own) for own in ids]), ids, strict=True))


def case_tokens(reader: Reader, case: dict[str, Any]) -> tuple[LessonTokens, int]:
    """A case as a lesson, its sentences re-read; and the tokens of its answer."""
    tokens = tokenize(load_tokenizer(str(reader.target)), case["question"] + case["answer"])
    answer = int((tokens.spans[:, 1] > len(case["question"].encode())).sum())
    ranges = tuple((begin, end) for begin, end in case["sentences"])
    lesson = tokens_of_lesson(reader.tokeniser, Lesson(case["context"], "", ranges))
    return LessonTokens(lesson.context, tokens.ids, lesson.reread), answer


def no_lesson(number: int) -> Lesson:
    raise BadInput("an evaluation has no lessons", found=number)


def show(name: str, found: dict[str, Any]) -> None:
    """Print an evaluation as rows of a table."""
    for length, at in found.items():
        kept = at.get("retention", {}).get("mean", float("nan"))
        facts = "  ".join(f"{arm} {share:.2f}" for arm, share in at["facts"].items())
        say(f"{name:24} {length:>5} tokens  retention {kept:.3f}  facts: {facts}")
        for kind, shares in at["kinds"].items():
            row = "  ".join(f"{arm} {share:.2f}" for arm, share in shares.items())
            say(f"{'':24} {kind:>12}  {row}")


def direction(args: argparse.Namespace, number: int, minutes: float) -> None:
    """One direction's map: fitted, saved, evaluated before and after calibration."""
    source, target = PAIR if number == 0 else PAIR[::-1]
    name = f"{source}-to-{target}"
    config = FitConfig(
        tokens=args.tokens,
        rank=args.rank,
        calibration=args.lessons,
        batch=args.batch,
        minutes=minutes,
        rate=args.rate,
        device=args.device,
        workers=args.workers,
        lessons=args.kind,
    )
    seen = 0

    def snapshot(wmatrix: WMatrix) -> None:
        nonlocal seen
        path = args.out / (f"{name}.wmatrix" if seen else f"{name}.regression.wmatrix")
        seen += 1
        wmatrix.to_int8().save(path)
        say(f"saved {path.name}: {path.stat().st_size / 2**20:.1f} MiB")

    wmatrix = fit(
        args.models / source, args.models / target, load([args.anchors]), config, snapshot=snapshot
    )
    snapshot(wmatrix)
    judge(args, name, {"": wmatrix, ".regression": None})


def at_lengths(
    args: argparse.Namespace, reader: Reader, wmatrix: WMatrix, mapped: Mapped | None = None
) -> dict[str, Any]:
    """The evaluation at each length."""
    return {
        str(length): evaluate(reader, wmatrix, args.held_out, args.limits, length, mapped)
        for length in LENGTHS
    }


def judge(args: argparse.Namespace, name: str, maps: dict[str, WMatrix | None]) -> None:
    """Evaluate a direction's maps, those that are None as they were saved."""
    source, target = (args.models / part for part in name.split("-to-"))
    reader = Reader(source, target, 3, device=FitConfig(device=args.device).resolved().device)
    for suffix, wmatrix in maps.items():
        if wmatrix is None:
            wmatrix = load_wmatrix(args.out / f"{name}{suffix}.wmatrix")
        found = at_lengths(args, reader, wmatrix)
        figures(args.out, f"{name}{suffix}", found)
        show(f"{name}{suffix}", found)


def attention(args: argparse.Namespace, number: int, minutes: float) -> None:
    """The experiment of `latent_attention.py`, after the first direction's calibration."""
    from latent_attention import compare

    evaluated = functools.partial(at_lengths, args)
    name = "-to-".join(PAIR)
    for variant, found in compare(args, name, minutes, evaluated, say):
        figures(args.out, f"{name}.{variant}", found)
        show(f"{name}.{variant}", found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, nargs=3, default=(3.0, 2.0, 2.0))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rank", type=int, default=576)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--lessons", type=int, default=10_000)
    parser.add_argument("--kind", choices=("short", "long"), default="long")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--limits", type=int, nargs=2, default=(48, 96))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sys.stderr = Tee(args.out / "log.txt")  # type: ignore[assignment]
    say(f"torch {torch.__version__}, CUDA {torch.cuda.is_available()}, {sys.version.split()[0]}")
    status = 0
    for number, (phase, minutes) in enumerate(
        zip((direction, direction, attention), args.minutes, strict=True)
    ):
        if minutes <= 0:
            continue
        try:  # One that fails must not cost the others: the machine may not be had again.
            phase(args, number, minutes)
        except Exception:
            status = 1
            say(traceback.format_exc())
    return status


if __name__ == "__main__":
    sys.exit(main())
