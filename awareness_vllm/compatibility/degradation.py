"""The measured sources of a W-Matrix's loss, and the file beside the W-Matrix that holds them.

benchmarks/degradation.py measures them and writes the file.
"""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from awareness_vllm.compatibility.report import Share
from awareness_vllm.files import atomic_write
from awareness_vllm.schema import FrozenModel
from awareness_vllm.wmatrix.certificate import Interval
from awareness_vllm.wmatrix.registry import WMatrixEntry

logger = logging.getLogger(__name__)

SUFFIX = ".degradation.json"


class Part(FrozenModel):
    """The loss on some texts by one measure, in nats for each token scored.

    `loss` is that of the map with all constraints, a naive conversion, over native reading.
    `recovered` is what lifting each constraint takes off it, a mean over all orders to lift them in
    (Shapley values), negative where it does harm; `remainder` is lost with all of them lifted.
    These six add up to `loss` exactly, and `shares` are their signed shares of it; there are none
    without a loss.

    `served` is the loss of the W-Matrix itself, `uncalibrated` that of the regression that it began
    as; `alone` what the regression loses more with a constraint than without it, all else as it is.
    `placed` is the loss with true positions and all other constraints, `placed_shares` the shares
    of these four and the remainder in it.
    """

    n: int
    loss: Interval
    recovered: dict[str, Interval]
    remainder: Interval
    shares: tuple[Share, ...]
    served: Interval
    uncalibrated: Interval
    alone: dict[str, Interval]
    placed: Interval
    placed_shares: tuple[Share, ...]


class Measures(FrozenModel):
    """The loss on some texts, by two measures.

    `nll` is of the text's tokens, as retention is; `kl` the divergence from the predictions after
    native reading: of all tokens of the vocabulary, so that less of it is chance.
    """

    nll: Part
    kl: Part


class Lost(FrozenModel):
    """The loss at one length of context: on all texts, and by the folder that they came from."""

    all: Measures
    kinds: dict[str, Measures]


class Degradation(FrozenModel):
    """The sources of a W-Matrix's loss, at each length of context in tokens.

    `wmatrix` is the digest of its file; `texts` that of the documents of which some were taken for
    each length, evenly. The maps were fitted on `anchor_tokens`, the limited ones to `rank`.
    """

    wmatrix: str
    contexts: dict[int, Lost]
    texts: str
    continuation: int
    anchor_tokens: int
    rank: int
    measured: datetime.date
    hardware: str
    versions: dict[str, str]

    def shares(self, tokens: int, measure: Literal["nll", "kl"] = "nll") -> tuple[Share, ...]:
        """The shares at the shortest measured length that `tokens` do not exceed, else at the
        longest."""
        lengths = sorted(self.contexts)
        length = next((length for length in lengths if length >= tokens), lengths[-1])
        part: Part = getattr(self.contexts[length].all, measure)
        return part.shares

    def save(self, wmatrix: Path) -> Path:
        """Write the file beside the W-Matrix, atomically; its path."""
        path = beside(wmatrix)
        with atomic_write(path) as draft:
            draft.write_text(self.model_dump_json(indent=1) + "\n")
        return path


def beside(wmatrix: Path) -> Path:
    """The file with the measurement of a W-Matrix."""
    return wmatrix.with_name(wmatrix.name + SUFFIX)


def load_for(entry: WMatrixEntry) -> Degradation | None:
    """The measurement of a W-Matrix; None without one, or where it is of another file.

    Certifying a map again makes another file of it, so its degradation is measured after that.
    """
    path = beside(entry.path)
    if not path.is_file():
        return None
    try:
        degradation = Degradation.model_validate_json(path.read_bytes())
    except OSError as error:
        logger.warning("%s is not used: %s", path.name, error)
        return None
    except ValidationError as error:
        logger.warning(
            "%s is not used: it is not of this version's form (%d fields); measure again with "
            "benchmarks/degradation.py",
            path.name,
            error.error_count(),
        )
        return None
    if degradation.wmatrix != entry.digest:
        logger.warning(
            "%s is not used: measured on the W-Matrix %s, this one is %s; measure it again with "
            "benchmarks/degradation.py",
            path.name,
            degradation.wmatrix[:12],
            entry.digest[:12],
        )
        return None
    return degradation
