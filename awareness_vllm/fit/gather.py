"""The sufficient statistics of the anchors, read by both models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.distributed import join
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.statistics import Statistics
from awareness_vllm.fit.texts import shuffled_windows

CHUNK_ROWS = 4096
"""Rows after which the sums are saved: a kill loses at most as many."""


def gather(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
) -> Statistics:
    """The sums over `config.tokens` rows of anchors, read in chunks of bounded memory.

    Each of n processes reads every n-th text, for an n-th of the rows, and returns the sums of all.

    Raises:
        BadInput: fewer rows than one chunk.
    """
    statistics, first = _resume(checkpoint)
    chunk: list[tuple[Tensor, Tensor]] = []
    pending = 0
    rank, processes = join()
    texts = shuffled_windows(documents, config.seed)[rank::processes]
    total = config.tokens // processes
    done = statistics.rows if statistics else 0
    with tqdm(total=total, initial=done, unit="tok", desc="anchors", disable=not progress) as bar:
        for number, text in enumerate(texts[first:], first + 1):
            if done + pending >= total:
                break
            x, y = reader.pairs(text)
            chunk.append((x, y))
            pending += len(x)
            bar.update(len(x))
            if pending < CHUNK_ROWS and done + pending < total and number < len(texts):
                continue
            xs, ys = (torch.cat(parts) for parts in zip(*chunk, strict=True))
            if statistics is None and len(xs) >= CHUNK_ROWS:
                statistics = Statistics.start(xs, ys)
            if statistics is not None:
                statistics.add(xs, ys)
                chunk, done, pending = [], statistics.rows, 0
                checkpoint.save("sums", statistics.tensors(), {"texts": number, "rows": done})
    if statistics is None:
        raise BadInput(
            "too few anchor tokens",
            found=f"{pending} usable tokens",
            expected=f"at least {CHUNK_ROWS}",
            remedy="give more anchors",
        )
    return statistics.all_reduce() if processes > 1 else statistics


def _resume(checkpoint: Checkpoint) -> tuple[Statistics | None, int]:
    """The sums of a killed run, and the number of texts in them."""
    if (saved := checkpoint.load("sums")) is None:
        return None, 0
    tensors, note = saved
    return Statistics(**tensors, rows=note["rows"]), note["texts"]


def held_out_rows(
    reader: Reader, documents: Sequence[Document], seed: int
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and target states [N, O] of eight texts of documents."""
    texts = shuffled_windows(documents, seed)[:8]
    x, y = zip(*(reader.pairs(text) for text in texts), strict=True)
    return torch.cat(x), torch.cat(y)
