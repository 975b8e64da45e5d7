"""What a pair's loss was measured to come from, and the file beside a W-Matrix that keeps it."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from awareness_vllm.compatibility.report import Share
from awareness_vllm.files import write_whole
from awareness_vllm.geometry import Strict
from awareness_vllm.wmatrix.bootstrap import mean, resamples
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.shelf import WMatrixEntry

logger = logging.getLogger(__name__)

SUFFIX = ".degradation.json"


class Part(Strict):
    """What was lost on some texts by one measure, in nats for each token scored.

    `loss` is the memory's more than native reading's; `recovered` what each ablation alone takes
    away of it, negative where it does harm; `unattributed` what is left with all of them at once,
    the harmful ones too. `shares` are those of what is recovered by each ablation alone: harm
    counts as nothing, and they add up to 1. They are empty where nothing was recovered.
    """

    n: int
    loss: Interval
    recovered: dict[str, Interval]
    unattributed: Interval
    shares: tuple[Share, ...]

    @property
    def clamped(self) -> tuple[str, ...]:
        """The sources whose ablation did harm, so that they count as nothing in the shares."""
        return tuple(name for name, nats in self.recovered.items() if nats.mean < 0)


class Measures(Strict):
    """What was lost on some texts, by two measures.

    `nll` is of the tokens that came, as retention is; `kl` the divergence from what the target says
    after native reading: of all tokens that it might expect, so that less of it is chance.
    """

    nll: Part
    kl: Part


class Lost(Strict):
    """What was lost at one length of context: on all texts, and by the folder they came from."""

    all: Measures
    kinds: dict[str, Measures]


class Degradation(Strict):
    """What a W-Matrix's loss comes from, at each length of context in tokens.

    `wmatrix` is the digest of its file; `texts` that of the documents of which `limit` were taken
    evenly for each length; `anchor_tokens` were read for the regression without a latent.
    """

    wmatrix: str
    contexts: dict[int, Lost]
    texts: str
    limit: int
    continuation: int
    anchor_tokens: int
    measured: datetime.date
    hardware: str
    versions: dict[str, str]

    def shares(self, tokens: int, measure: Literal["nll", "kl"] = "nll") -> tuple[Share, ...]:
        """The shares at the shortest measured length that `tokens` do not exceed, else at the
        longest."""
        lengths = sorted(self.contexts)
        length = next((length for length in lengths if length >= tokens), lengths[-1])
        found: Part = getattr(self.contexts[length].all, measure)
        return found.shares

    def save(self, wmatrix: Path) -> Path:
        """Write the file beside the W-Matrix, atomically; its path."""
        path = beside(wmatrix)
        write_whole(path, self.model_dump_json(indent=1) + "\n")
        return path


def beside(wmatrix: Path) -> Path:
    """Where the measurement of a W-Matrix file is kept."""
    return wmatrix.with_name(wmatrix.name + SUFFIX)


def load_for(entry: WMatrixEntry) -> Degradation | None:
    """What was measured of a W-Matrix; None where nobody has, or only of another file.

    Certifying a map again makes another file of it, so its degradation is measured after that.
    """
    path = beside(entry.path)
    if not path.is_file():
        return None
    try:
        found = Degradation.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        logger.warning("%s is not used: %s", path.name, error)
        return None
    if found.wmatrix != entry.digest:
        logger.warning(
            "%s is not used: measured on the W-Matrix %s, this one is %s; measure it again with "
            "benchmarks/degradation.py",
            path.name,
            found.wmatrix[:12],
            entry.digest[:12],
        )
        return None
    return found


def part(
    native: np.ndarray,
    memory: np.ndarray,
    ablated: Mapping[str, np.ndarray],
    together: np.ndarray,
    priors: Mapping[str, float],
) -> Part:
    """What the nats [n] of texts in each arm say."""
    recovered = {name: memory - nats for name, nats in ablated.items()}
    return Part(
        n=len(native),
        loss=Interval(**mean(memory - native)),
        recovered={name: Interval(**mean(nats)) for name, nats in recovered.items()},
        unattributed=Interval(**mean(together - native)),
        shares=shares(recovered, priors),
    )


def shares(recovered: Mapping[str, np.ndarray], priors: Mapping[str, float]) -> tuple[Share, ...]:
    """Each source's share of what was recovered, with its interval over documents, beside the
    published one; the largest published first."""
    nats = np.stack([*recovered.values()], axis=1)
    clamped = nats.mean(0).clip(0)
    if not clamped.any():
        return ()
    draws = nats[resamples(len(nats))].mean(1).clip(0)
    draws = draws[draws.any(1)]
    draws /= draws.sum(1, keepdims=True)
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    found = [
        Share(source=name, share=Interval(mean=m, ci_low=a, ci_high=b), prior=priors[name])
        for name, m, a, b in zip(recovered, clamped / clamped.sum(), low, high, strict=True)
    ]
    return tuple(sorted(found, key=lambda share: -share.prior))
