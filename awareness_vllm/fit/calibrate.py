"""Calibration: training of the map through the target, on its predictions after the memory.

The ridge fits states; what counts are the target's predictions after them. Each step builds the
target's cache of the mapped states of some examples, and lowers the KL divergence from the
target's native predictions of the texts' continuations.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.divergence import weighted_divergence
from awareness_vllm.fit.examples import Batch, CalibrationExamples
from awareness_vllm.fit.memories import logits_after
from awareness_vllm.fit.reader import Reader
from awareness_vllm.wmatrix.file import WMatrix

PARTS = ("encode", "decode", "bias")
SHARES = (0.2, 1.0, 1.0)
"""Each part's rate as a share of the decoder's: the encoder changes all outputs at once."""
BETAS = (0.9, 0.98)


WARM_UP = 10
"""Steps over which the rate rises."""
SAVE_EVERY = 50
"""Steps between two checkpoints on a CPU."""
Snapshot = Callable[[WMatrix], None]
"""What is done with a map in between."""


class Clock:
    """Seconds of a training, those of a killed run included."""

    def __init__(self, before: float) -> None:
        self.before, self.begun = before, time.monotonic()
        self.minutes = int(before // 60)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def minute_is_over(self) -> bool:
        """Whether a further minute is full since this was asked."""
        before, self.minutes = self.minutes, int(self.seconds // 60)
        return self.minutes > before


@dataclass
class Training:
    """The state of a training: the map's parts in float32, the optimizer's moments.

    `scores` are the mean KL divergences on the held-out examples, before the first epoch and after
    each; `best` are the parts with the lowest.
    """

    parts: dict[str, Tensor]
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    scores: list[float]
    step: int = 0
    seconds: float = 0.0
    """Steps done, and the time that they took."""

    @classmethod
    def start(cls, wmatrix: WMatrix) -> Training:
        """A training from the first step."""
        rows = torch.contiguous_format  # the solver's matrices are column-major, files row-major
        parts = {
            name: getattr(wmatrix, name).float().clone(memory_format=rows).requires_grad_()
            for name in PARTS
        }
        optimizer = torch.optim.Adam([{"params": [p]} for p in parts.values()], betas=BETAS)
        best = {name: part.detach().clone() for name, part in parts.items()}
        return cls(parts, optimizer, best, [])

    def save(self, checkpoint: Checkpoint) -> None:
        """Write parts, moments and scores into a checkpoint."""
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, part in self.parts.items():
            tensors[f"part.{name}"] = part.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if part in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[part][moment]
        updates = [int(state["step"]) for state in self.optimizer.state.values()]
        note = {
            "step": self.step,
            "seconds": self.seconds,
            "updates": max(updates, default=0),
            "scores": self.scores,
        }
        checkpoint.save("calibration", tensors, note)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the last save of a killed run, if there is one."""
        if (saved := checkpoint.load("calibration")) is None:
            return
        tensors, note = saved
        self.step, self.seconds, self.scores = note["step"], note["seconds"], note["scores"]
        for name, part in self.parts.items():
            self.best[name] = tensors[f"best.{name}"].to(part.device)
            part.data.copy_(tensors[f"part.{name}"])
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[part] = {
                    "step": torch.tensor(float(note["updates"])),
                    "exp_avg": tensors[f"exp_avg.{name}"].to(part.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(part.device),
                }

    def set_rates(self, rate: float, stds: Sequence[float]) -> None:
        """Set each part's rate, relative to its standard deviation before the training."""
        for group, std, share in zip(self.optimizer.param_groups, stds, SHARES, strict=True):
            group["lr"] = rate * std * share

    def record(self, score: float) -> None:
        """Append a score; the parts become the best ones if it is the lowest yet."""
        if not self.scores or score <= min(self.scores):
            self.best = {name: part.detach().clone() for name, part in self.parts.items()}
        self.scores.append(score)

    def is_stalled(self, patience: int) -> bool:
        """Whether the last `patience` epochs had no better score."""
        best = self.scores.index(min(self.scores))
        return len(self.scores) - 1 - best >= patience


def calibrate(
    wmatrix: WMatrix,
    examples: CalibrationExamples,
    held_out: CalibrationExamples,
    config: FitConfig,
    checkpoint: Checkpoint,
    *,
    progress: bool = True,
    snapshot: Snapshot | None = None,
) -> tuple[WMatrix, list[float]]:
    """Train encoder, decoder and bias by Adam; a killed training resumes from the checkpoint.

    After each epoch the map is scored on the held-out examples; training ends after
    `config.patience` epochs without a better score, or after `config.minutes`.

    Args:
        snapshot: is given the map about once a minute.

    Returns:
        the map with the best score on the held-out examples (the last one where there are none),
        and the scores: mean KL divergences before the first epoch and after each.
    """
    reader = examples.reader
    stds = [getattr(wmatrix, name).float().std().item() for name in PARTS]
    wmatrix = wmatrix.to(reader.device)
    training = Training.start(wmatrix)
    training.resume(checkpoint)
    if len(held_out) and not training.scores:
        training.record(mean_kl(wmatrix, reader, training.parts, held_out))
    total = config.epochs * len(examples)
    bar = tqdm(total=total, initial=training.step, desc="calibration", disable=not progress)
    losses: list[Tensor] = []
    clock: Clock | None = None
    for epoch, batch in _batches(examples, config, training.step):
        clock = clock or Clock(training.seconds)  # from the first batch on
        training.seconds = clock.seconds
        if (share := progress_share(training, total, config.minutes)) >= 1:
            break
        training.set_rates(config.rate * schedule(training.step, share), stds)
        training.optimizer.zero_grad()
        loss = kl_divergence(wmatrix, reader, training.parts, batch)
        loss.backward()
        training.optimizer.step()
        training.step += 1
        losses = [*losses[-19:], loss.detach()]
        bar.update()
        if (regular := training.step % SAVE_EVERY == 0) or not examples.on_gpu:
            bar.set_postfix(kl=f"{torch.stack(losses).mean().item():.3f}")
        if len(held_out) and training.step % len(examples) == 0:
            training.record(mean_kl(wmatrix, reader, training.parts, held_out))
            bar.write(f"epoch {epoch + 1}: held-out KL divergence {training.scores[-1]:.4f}")
            if training.is_stalled(config.patience):
                break
        if (minute := clock.minute_is_over()) or (regular and not examples.on_gpu):
            training.save(checkpoint)
        if minute and snapshot is not None:
            snapshot(_trained(wmatrix, training.parts))
    bar.close()
    final = training.best if training.scores else training.parts
    return _trained(wmatrix, final), training.scores


def until_a_time(config: FitConfig, checkpoint: Checkpoint, until: float) -> FitConfig:
    """A configuration whose calibration ends at a time, by `time.monotonic`, with what a killed run
    did before."""
    saved = checkpoint.load("calibration")
    before = saved[1]["seconds"] if saved else 0.0
    return replace(config, minutes=(before + max(0.0, until - time.monotonic())) / 60)


def _batches(
    examples: CalibrationExamples, config: FitConfig, step: int
) -> Iterator[tuple[int, Batch]]:
    """The epoch and the batch of each step from `step` on; without end in a time's budget."""
    begin, epoch = divmod(step, len(examples) or sys.maxsize)[::-1]
    while epoch < config.epochs or config.minutes is not None:
        numbers = islice(examples.numbers(epoch, config.seed), begin, None)
        yield from ((epoch, batch) for batch in examples.batches(numbers))
        epoch, begin = epoch + 1, 0


def _trained(wmatrix: WMatrix, parts: dict[str, Tensor]) -> WMatrix:
    """The map with trained parts, on the CPU."""
    return replace(
        wmatrix,
        encode=parts["encode"].detach().bfloat16(),
        decode=parts["decode"].detach().bfloat16(),
        bias=parts["bias"].detach().clone(),
    ).to("cpu")


def progress_share(training: Training, total: int, minutes: float | None) -> float:
    """The share of a training that is done: of its steps, or of its time."""
    if minutes is None:
        return training.step / total
    return training.seconds / (60 * minutes) if minutes else 1.0


def schedule(step: int, share: float) -> float:
    """The share of the full rate at a step: a linear warm-up, then cosine decay."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def mean_kl(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], examples: CalibrationExamples
) -> float:
    """The mean KL divergence over examples."""
    batches = examples.batches(examples.numbers(0, 0))
    scores = [
        (len(batch.ids), kl_divergence(wmatrix, reader, parts, batch).item()) for batch in batches
    ]
    return sum(n * score for n, score in scores) / sum(n for n, _ in scores)


def kl_divergence(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], batch: Batch
) -> Tensor:
    """KL divergence of the predictions after mapped memories from the native ones, in nats per
    token, the mean over a batch's lessons."""
    return mean_divergence(mapped_logits(wmatrix, reader, parts, batch), batch)


def mean_divergence(logits: Tensor, batch: Batch) -> Tensor:
    """KL divergence of logits from a batch's native ones, in nats per token, the mean over its
    lessons."""
    counts = torch.tensor([len(ids) for ids in batch.ids])
    weights = (1 / counts.repeat_interleave(counts) / len(counts)).to(logits.device)
    return weighted_divergence(logits, batch.native, weights, batch.taken)


def mapped_logits(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], batch: Batch
) -> Tensor:
    """The logits [sum of the continuations' tokens, V] after the mapped memories of a batch."""
    encode, decode, bias = (parts[name].to(batch.features.dtype) for name in PARTS)
    flat = (batch.features @ encode) @ decode + bias
    if wmatrix.manifest.residual:
        flat = flat + source_states(wmatrix, batch.features)
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    return logits_after(
        reader, sinks, flat, batch.lengths, batch.ids, reread=batch.reread, tokens=batch.tokens
    )


def source_states(wmatrix: WMatrix, features: Tensor) -> Tensor:
    """The source's states [T, source_width] of standardised features [T, F]."""
    width = wmatrix.manifest.source_width
    return features[:, :width] / wmatrix.scale[:width] + wmatrix.mean[:width]
