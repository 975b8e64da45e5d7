"""A quick measurement of a memory on itself: its last quarter, read after the rest, in five arms.

States of a prefix do not depend on what follows, so a package's first part is a memory of its own,
and its text's last part is a real continuation. The source model is not needed.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from awareness_vllm.compatibility.context import CheckContext, MemoryInfo, SelfTest
from awareness_vllm.errors import BadInput, PackageCorrupt
from awareness_vllm.evaluate.arms import Item, PlanShape, conditions
from awareness_vllm.evaluate.bootstrap import retention
from awareness_vllm.evaluate.conditions import EvalHarness, token_nll
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package, beginning, read, verify, with_states
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.file import WMatrix, load

SCORED_SHARE = 0.25
"""The share of a memory that is scored."""
MOST_SCORED, LEAST_SCORED = 256, 32
"""Tokens that are scored at most, and at least: fewer say nothing."""
STRETCH = 16
"""Tokens that are resampled together: neighbours are alike."""


def with_self_test(check: CheckContext, memory: object, target: str | Path) -> CheckContext:
    """The check with the measurement of its memory.

    Args:
        memory: the package, where the check has no file of it.

    Raises:
        BadInput: no package, target folder or W-Matrix to measure with.
    """
    package = with_states(verify(check.memory.path)) if check.memory.path else memory
    at_hand = check.entry is not None and not check.entry.listed
    reachable = check.target.geometry is not None and (check.exact or at_hand)
    if not isinstance(package, Package) or not reachable:
        raise BadInput(
            "there is nothing to measure",
            found=f"{check.memory.name}, for {check.target.name}",
            expected="a package, the target's folder, and a W-Matrix between the two models, as "
            "files that are here",
            remedy="check without measuring; `awareness pull` what is listed, or fit a W-Matrix "
            "with `awareness fit`",
        )
    wmatrix = None if check.exact or check.entry is None else load(check.entry.path)
    tail = 0 if wmatrix is None else check.config.tail
    other = other_memory(check.memory)
    result = measure(package, wmatrix, resolve_folder(target), tail, other)
    return replace(check, self_test=result)


def other_memory(memory: MemoryInfo) -> Package | None:
    """Another memory of the same source in the same folder, the smallest, for the wrong-memory arm;
    None where there is none."""
    if memory.path is None or memory.source.geometry is None:
        return None
    others = [p for p in memory.path.parent.glob("mem_*.safetensors") if p != memory.path]
    for path in sorted(others, key=lambda p: (p.stat().st_size, p.name)):
        with contextlib.suppress(PackageCorrupt):  # a damaged neighbour is not checked here
            manifest = read_manifest(path)
            usable = manifest.has_text and manifest.latent is None
            if usable and manifest.geometry.same_model(memory.source.geometry):
                return read(path)
    return None


def measure(
    package: Package,
    wmatrix: WMatrix | None,
    target: str | Path,
    tail: int = 0,
    other: Package | None = None,
) -> SelfTest:
    """Measure a memory on its own last part.

    Args:
        wmatrix: None where the target made the memory itself.
        tail: last tokens of the first part that the target reads itself, as it does when serving.
        other: another memory of the source, for the wrong-memory arm.

    Raises:
        BadInput: a memory without text, or too short; one that does not help with its own end.
    """
    return measure_with(EvalHarness(None, Path(target), wmatrix), package, tail, other)


def measure_with(
    harness: EvalHarness, package: Package, tail: int = 0, other: Package | None = None
) -> SelfTest:
    """`measure` with models that are loaded already."""
    first, ids = split(harness, package)
    shape = PlanShape(tail)
    logprobs = conditions(harness, Item(first, ids, len(ids) - 1, other=other), [shape])
    nll = {name: token_nll(probs, ids).numpy() for name, probs in logprobs.items()}
    served = nll[shape.condition()]
    return SelfTest(
        conditions={name: float(values.mean()) for name, values in nll.items()},
        retention=of_further_text(retention(*map(sums, (nll["native"], served, nll["none"])))),
        context=len(harness.ids(first.text)),
        scored=len(ids) - 1,
    )


def split(harness: EvalHarness, package: Package) -> tuple[Package, list[int]]:
    """A memory's first part, and the target's ids of the rest (the first one is not scored)."""
    scored = min(MOST_SCORED, int(package.manifest.tokens * SCORED_SHARE))
    if not package.manifest.has_text or scored < LEAST_SCORED:
        raise BadInput(
            "the memory cannot be measured on itself",
            found=f"{package.manifest.tokens} tokens"
            + ("" if package.manifest.has_text else " without their text"),
            expected=f"at least {round(LEAST_SCORED / SCORED_SHARE)} tokens with their text",
            remedy="rely on the certificate, or measure with texts: `awareness eval`",
        )
    first = beginning(package, package.manifest.tokens - scored)
    rest = package.text[len(first.text) :]
    return first, tokenize(load_tokenizer(str(harness.target)), rest).ids


def of_further_text(measured: dict[str, float]) -> Interval:
    """The interval that a second measurement lies in, from that of the first: both are subject to
    chance, so it is wider by the root of two."""
    mean = measured["mean"]
    low, high = (mean + math.sqrt(2) * (measured[end] - mean) for end in ("ci_low", "ci_high"))
    return Interval(mean=mean, ci_low=low, ci_high=high)


def sums(nll: np.ndarray) -> np.ndarray:
    """Sums over stretches of neighbouring tokens, [T] to [T / STRETCH, rounded up]."""
    return np.add.reduceat(nll, np.arange(0, len(nll), STRETCH))
