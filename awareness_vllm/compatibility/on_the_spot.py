"""A quick measurement on the memory itself: its last part, after its first, in five arms.

States of a prefix do not depend on what follows, so a package's first part is a memory of its own,
and its text's last part is a continuation that nobody has to make up. The source model is not
needed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from awareness_vllm.compatibility.context import CheckContext, OnTheSpot, Subject
from awareness_vllm.errors import BadInput, PackageCorrupt
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import EvalHarness, tail_condition, token_nll
from awareness_vllm.models.describe import resolve_folder
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package, beginning, read, verify
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.file import WMatrix, load

LAST = 0.25
"""The share of a memory that is scored, but at most so many tokens:"""
MOST = 256
LEAST = 32
"""Fewer scored tokens than this say nothing."""
STRETCH = 16
"""Tokens that are resampled together: neighbours are alike."""


def measured(check: CheckContext, given: object, target: str | Path) -> CheckContext:
    """The case with what its memory's own last part says.

    Args:
        given: the memory as it was given, where it is no file.

    Raises:
        BadInput: nothing that can be measured, or nothing to measure it with.
    """
    memory = verify(check.subject.path) if check.subject.path else given
    reachable = check.target.geometry is not None and (check.exact or check.entry is not None)
    if not isinstance(memory, Package) or not reachable:
        raise BadInput(
            "there is nothing to measure",
            found=f"{check.subject.name}, for {check.target.name}",
            expected="a package, the target's folder, and a W-Matrix between the two models",
            remedy="check without measuring, or fit a W-Matrix with `awareness fit`",
        )
    wmatrix = None if check.exact or check.entry is None else load(check.entry.path)
    tail = 0 if wmatrix is None else check.config.tail
    wrong = another(check.subject)
    found = measure(memory, wmatrix, resolve_folder(target), tail, wrong)
    return replace(check, found=found)


def another(subject: Subject) -> Package | None:
    """Another memory of the same source in the same folder, the smallest, for the wrong-memory arm;
    None where there is none."""
    if subject.path is None or subject.source.geometry is None:
        return None
    others = [p for p in subject.path.parent.glob("mem_*.safetensors") if p != subject.path]
    for path in sorted(others, key=lambda p: (p.stat().st_size, p.name)):
        with contextlib.suppress(PackageCorrupt):  # a damaged neighbour is not what was asked for
            manifest = read_manifest(path)
            if manifest.has_text and manifest.geometry.same_model(subject.source.geometry):
                return read(path)
    return None


def measure(
    package: Package,
    wmatrix: WMatrix | None,
    target: str | Path,
    tail: int = 0,
    other: Package | None = None,
) -> OnTheSpot:
    """Measure a memory on its own last part.

    Args:
        wmatrix: None where the target made the memory itself.
        tail: last tokens of the first part that the target reads itself, as it does when serving.
        other: another memory of the source, for the wrong-memory arm.

    Raises:
        BadInput: a memory without text, or too short; one that is worth nothing for its own end.
    """
    return measure_with(EvalHarness(None, Path(target), wmatrix), package, tail, other)


def measure_with(
    harness: EvalHarness, package: Package, tail: int = 0, other: Package | None = None
) -> OnTheSpot:
    """`measure` with models that are loaded already."""
    first, ids = parted(harness, package)
    logprobs = harness.conditions(first, other, ids, len(ids) - 1, (tail,) if tail else ())
    nll = {arm: token_nll(found, ids).numpy() for arm, found in logprobs.items()}
    served = nll[tail_condition(tail)]
    return OnTheSpot(
        conditions={arm: float(values.mean()) for arm, values in nll.items()},
        retention=further(retention(*map(stretches, (nll["native"], served, nll["none"])))),
        context=len(harness.ids(first.text)),
        scored=len(ids) - 1,
    )


def parted(harness: EvalHarness, package: Package) -> tuple[Package, list[int]]:
    """A memory's first part, and the target's ids of the rest (one to start from)."""
    scored = min(MOST, int(package.manifest.tokens * LAST))
    if not package.manifest.has_text or scored < LEAST:
        raise BadInput(
            "the memory cannot be measured on itself",
            found=f"{package.manifest.tokens} tokens"
            + ("" if package.manifest.has_text else " without their text"),
            expected=f"at least {round(LEAST / LAST)} tokens with their text",
            remedy="rely on the certificate, or measure with texts: `awareness eval`",
        )
    first = beginning(package, package.manifest.tokens - scored)
    rest = package.text[len(first.text) :]
    return first, tokenize(load_tokenizer(str(harness.target)), rest).ids


def further(found: dict[str, float]) -> Interval:
    """From the interval of a figure to that of another such figure: both are subject to chance."""
    mean = found["mean"]
    low, high = (mean + math.sqrt(2) * (found[end] - mean) for end in ("ci_low", "ci_high"))
    return Interval(mean=mean, ci_low=low, ci_high=high)


def stretches(nll: np.ndarray) -> np.ndarray:
    """Sums over neighbours."""
    return np.add.reduceat(nll, np.arange(0, len(nll), STRETCH))
