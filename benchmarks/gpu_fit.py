"""Both directions' maps and the experiments with variants on a GPU that is lent for minutes.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def arms(
    reader: Reader, wmatrix: WMatrix, maps: Mapping[str, Mapped], batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """Logits after native reading, nothing, each map, and each with what is re-read."""
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    nothing = torch.zeros(0, reader.target_geometry.width, device=reader.device)
    yield "native", batch.native
    yield "none", logits_after(reader, sinks, nothing, [0] * len(batch.ids), batch.ids)
    for name, mapped in maps.items():
        yield name, mapped(replace(batch, reread=None))
        if batch.reread is not None:
            yield f"{name}, re-read", mapped(batch)


@torch.no_grad()
def evaluate(
    reader: Reader,
    wmatrix: WMatrix,
    held_out: Path,
    limits: Sequence[int],
    length: int,
    maps: Mapping[str, Mapped],
) -> dict[str, Any]:
    """Retention of texts, exact matches of needles and their log probabilities (`logp`), of each of
    some maps with one source, at a length of contexts."""
    examples = CalibrationExamples(reader, wmatrix, no_lesson, 0, 1, whole=True)
    wmatrix = examples.wmatrix
    size = max(1, TOKENS_AT_ONCE // length)
    folders = [held_out / name for name in ("crawl", "debian-history", "wordnet")]
    documents = load([folder for folder in folders if folder.is_dir()])
    if length > 500:
        documents = join_documents(documents, length + CONTINUATION)
    texts = excerpts(reader, documents, length, limits[0])
    nll: dict[str, list[float]] = {}
    for lessons in pieces(texts, size):
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, maps, batch):
            for own, ids in by_lesson(logits, batch.ids):
                nll.setdefault(name, []).append(-label_logp(own[:-1], ids[1:]).mean().item())
    found: dict[str, Any] = {}  # of texts, then of needles
    if len(texts) > 1:
        losses = {name: np.array(values) for name, values in nll.items()}
        found["retention"] = {
            name: retention(losses["native"], losses[name], losses["none"]) for name in maps
        }
    cases = sample_evenly(needles(held_out / "needles" / "cases.jsonl", length), limits[1])
    exact: dict[str, list[bool]] = {}
    logp: dict[str, list[float]] = {}
    for some in pieces(cases, size):
        lessons, counts = zip(*(case_tokens(reader, case) for case in some), strict=True)
        batch = examples.read(lessons)
        for name, logits in arms(reader, wmatrix, maps, batch):
            for (own, ids), count in zip(by_lesson(logits, batch.ids), counts, strict=True):
                answer, labels = own[-count - 1 : -1], ids[-count:]
                exact.setdefault(name, []).append(answer.argmax(-1).tolist() == labels)
                logp.setdefault(name, []).append(label_logp(answer, labels).sum().item())
    kinds = np.array([case["kind"] for case in cases])
    found["facts"] = {name: float(np.mean(hits)) for name, hits in exact.items()}
    found["logp"] = {name: float(np.mean(values)) for name, values in logp.items()}
    found["kinds"] = {
        kind: {name: float(np.array(hits)[kinds == kind].mean()) for name, hits in exact.items()}
        for kind in dict.fromkeys(kinds.tolist())
    }
    return found


def label_logp(logits: Tensor, labels: Sequence[int]) -> Tensor:
    """The log probabilities [N] of labels, of logits [N, V]."""
    own = torch.tensor(labels, device=logits.device)
    return -torch.nn.functional.cross_entropy(logits.float(), own, reduction="none")


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
        kept = "  ".join(f"{arm} {r['mean']:.3f}" for arm, r in at.get("retention", {}).items())
        facts = "  ".join(f"{arm} {share:.2f}" for arm, share in at["facts"].items())
        say(f"{name:24} {length:>5} tokens  retention: {kept}  facts: {facts}")
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


def judge(args: argparse.Namespace, name: str, maps: dict[str, WMatrix | None]) -> None:
    """Evaluate a direction's maps, those that are None as they were saved."""
    reader = reader_of(args, name)
    for suffix, wmatrix in maps.items():
        wmatrix = wmatrix or load_wmatrix(args.out / f"{name}{suffix}.wmatrix")
        parts = {part: getattr(wmatrix.to(reader.device), part) for part in PARTS}
        mapped = functools.partial(mapped_logits, wmatrix.to(reader.device), reader, parts)
        found = {
            str(n): evaluate(reader, wmatrix, args.held_out, args.limits, n, {"memory": mapped})
            for n in LENGTHS
        }
        figures(args.out, f"{name}{suffix}", found)
        show(f"{name}{suffix}", found)


def reader_of(args: argparse.Namespace, name: str) -> Reader:
    """The reader of a direction's two models, on the run's device."""
    source, target = (args.models / part for part in name.split("-to-"))
    return Reader(source, target, 3, device=FitConfig(device=args.device).resolved().device)


def variants(args: argparse.Namespace, number: int, minutes: float) -> None:
    """The experiments of `map_variants.py` on the first direction's map."""
    from map_variants import compare

    name = "-to-".join(PAIR)
    saved = [args.out / f"{name}{suffix}.wmatrix" for suffix in ("", ".regression")]
    wmatrix = load_wmatrix(next(path for path in saved if path.exists()))
    args.minutes = minutes
    found = compare(reader_of(args, name), wmatrix, args.anchors, args, LENGTHS)
    figures(args.out, f"{name}.variants", found)
    show(f"{name}.variants", {str(n): found[str(n)] for n in LENGTHS})


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
        zip((direction, direction, variants), args.minutes, strict=True)
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
