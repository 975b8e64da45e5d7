"""The sufficient statistics of the anchors, read by both models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

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
from awareness_vllm.fit.tokens import TextTokens, Tokeniser, by_length, pieces

CHUNK_ROWS = 4096
"""Rows after which the sums are saved: a kill loses at most as many."""
GPU_TEXTS, GPU_TOKENS = 64, 32_768
"""Texts that a GPU's process tokenises at once, and padded tokens that a GPU reads at once."""


def gather(
    reader: Reader,
    documents: Sequence[Document],
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool,
    until: float | None = None,
) -> Statistics:
    """The sums over `config.tokens` rows of anchors, read in chunks of bounded memory.

    Each of n processes reads every n-th text, for an n-th of the rows, and returns the sums of all.

    Args:
        until: the time, by `time.monotonic`, after which no more is read than a regression needs.

    Raises:
        BadInput: fewer rows than one chunk.
    """
    statistics, first = _resume(checkpoint, reader.device)
    on_gpu = torch.device(reader.device).type != "cpu"
    chunk: list[tuple[Tensor, Tensor]] = []
    pending = 0
    rank, processes = join()
    texts = shuffled_windows(documents, config.seed)[rank::processes]
    total = config.tokens // processes
    done, number = statistics.rows if statistics else 0, first
    with tqdm(total=total, initial=done, unit="tok", desc="anchors", disable=not progress) as bar:
        for batch in batches(reader, texts[first:]):
            if done + pending >= total:
                break
            if until is not None and time.monotonic() >= until:
                total = min(total, max(done + pending, least_rows(reader)))
            number += len(batch)
            x, y = reader.pairs(batch)
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
                if not on_gpu:  # which reads faster than it saves
                    checkpoint.save("sums", statistics.tensors(), {"texts": number, "rows": done})
    if statistics is None:
        raise BadInput(
            "too few anchor tokens",
            found=f"{pending} usable tokens",
            expected=f"at least {CHUNK_ROWS}",
            remedy="give more anchors",
        )
    return statistics.all_reduce() if processes > 1 else statistics


def least_rows(reader: Reader) -> int:
    """Rows with which a regression is worth having: one for each of its features, and a chunk."""
    return max(CHUNK_ROWS, feature_count(reader))


def feature_count(reader: Reader) -> int:
    """F, the features that the reader makes of a token."""
    tokens = 0 if reader.predecessors is None else 1 + reader.predecessors
    tables = sum(table.shape[1] for table in reader.position_embeddings.values())
    return reader.width + tokens * reader.target_geometry.hidden_size + tables


def batches(reader: Reader, texts: Sequence[str]) -> Iterator[list[TextTokens]]:
    """The texts' tokens, as many at once as the reader's device takes: on a CPU one by one, on a
    GPU many, tokenised beside it."""
    if torch.device(reader.device).type == "cpu":
        yield from ([reader.tokeniser.text(text)] for text in texts)
        return
    for piece in reader.workers.map(_tokenise, pieces(texts, GPU_TEXTS)):
        yield from by_length(piece, GPU_TOKENS)


def _tokenise(state: tuple[Tokeniser, object], texts: Sequence[str]) -> list[TextTokens]:
    return [state[0].text(text) for text in texts]


def _resume(checkpoint: Checkpoint, device: torch.device | str) -> tuple[Statistics | None, int]:
    """The sums of a killed run, and the number of texts in them."""
    if (saved := checkpoint.load("sums")) is None:
        return None, 0
    tensors, note = saved
    sums = {name: tensor.to(device) for name, tensor in tensors.items()}
    return Statistics(**sums, rows=note["rows"]), note["texts"]


def held_out_rows(
    reader: Reader, documents: Sequence[Document], seed: int
) -> tuple[Tensor, Tensor]:
    """Features [N, F] and target states [N, O] of eight texts of documents."""
    texts = shuffled_windows(documents, seed)[:8]
    x, y = zip(*(reader.pairs([reader.tokeniser.text(text)]) for text in texts), strict=True)
    return torch.cat(x), torch.cat(y)
