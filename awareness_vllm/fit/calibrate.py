"""Calibration: the target's own judgement of the aligned memory, as gradients into the map.

The ridge fits states; what counts is what the target says after them. Each step injects one
lesson's mapped states as the target's cache, and lowers the divergence from the target's native
prediction of the text's continuation.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.fit.examples import CalibrationExample, CalibrationExamples
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.build_cache import build_cache
from awareness_vllm.models.hf import last_logits
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("encode", "decode", "bias")
SHARES = (0.2, 1.0, 1.0)
"""Each part's step as a share of the decoder's: the encoder moves the latent under all outputs."""
BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class CalibrationConfig:
    """Adam over the lessons, `batch` of them a step. `rate` is relative to each tensor's spread;
    after each epoch the map is tried on the held-out lessons, and training ends when it has not
    become better for `patience` epochs. The work is saved every `save_every` lessons."""

    batch: int = 1
    epochs: int = 1
    rate: float = 3e-3
    warm_up: int = 10
    patience: int = 3
    save_every: int = 50
    seed: int = 0


@dataclass
class Training:
    """The map in training: its parts in float32, and how far the training is.

    `scores` are the divergences on the held-out lessons, before the first epoch and after each;
    `best` are the parts that had the lowest.
    """

    parts: dict[str, Tensor]
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    scores: list[float]
    step: int = 0
    """Lessons gone through."""

    @classmethod
    def start(cls, wmatrix: WMatrix) -> Training:
        rows = torch.contiguous_format  # the solver's matrices lie by columns, files want rows
        parts = {
            name: getattr(wmatrix, name).float().clone(memory_format=rows).requires_grad_()
            for name in PARTS
        }
        optimizer = torch.optim.Adam([{"params": [p]} for p in parts.values()], betas=BETAS)
        best = {name: part.detach().clone() for name, part in parts.items()}
        return cls(parts, optimizer, best, [])

    def save(self, work: Checkpoint) -> None:
        tensors = {f"best.{name}": tensor for name, tensor in self.best.items()}
        for name, part in self.parts.items():
            tensors[f"part.{name}"] = part.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                if part in self.optimizer.state:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[part][moment]
        updates = [int(state["step"]) for state in self.optimizer.state.values()]
        note = {"step": self.step, "updates": max(updates, default=0), "scores": self.scores}
        work.save("calibration", tensors, note)

    def resume(self, work: Checkpoint) -> None:
        """Go on where a killed run's last save left off, if there is one."""
        if (kept := work.load("calibration")) is None:
            return
        tensors, note = kept
        self.step, self.scores = note["step"], note["scores"]
        for name, part in self.parts.items():
            self.best[name] = tensors[f"best.{name}"]
            part.data.copy_(tensors[f"part.{name}"])
            if f"exp_avg.{name}" in tensors:
                self.optimizer.state[part] = {
                    "step": torch.tensor(float(note["updates"])),
                    "exp_avg": tensors[f"exp_avg.{name}"],
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"],
                }

    def judge(self, score: float) -> None:
        """Note a divergence on the held-out lessons; keep the parts if it is the lowest yet."""
        if not self.scores or score <= min(self.scores):
            self.best = {name: part.detach().clone() for name, part in self.parts.items()}
        self.scores.append(score)

    def is_stuck(self, patience: int) -> bool:
        """Whether the last so many epochs brought nothing better."""
        best = self.scores.index(min(self.scores))
        return len(self.scores) - 1 - best >= patience


def calibrate(
    wmatrix: WMatrix,
    examples: CalibrationExamples,
    held_out: CalibrationExamples,
    config: CalibrationConfig,
    work: Checkpoint,
    *,
    progress: bool = True,
) -> tuple[WMatrix, list[float]]:
    """Train encoder, decoder and bias; the work is taken up again after a kill.

    Returns:
        the map that did best on the held-out lessons (the last one where there are none), and its
        divergence there before the first epoch and after each.
    """
    training = Training.start(wmatrix)
    training.resume(work)
    reader, total = examples.reader, config.epochs * len(examples)
    spread = [getattr(wmatrix, name).float().std().item() for name in PARTS]
    if len(held_out) and not training.scores:
        training.judge(judged(wmatrix, reader, training.parts, held_out))
    losses: list[float] = []
    bar = tqdm(total=total, initial=training.step, desc="calibration", disable=not progress)
    while training.step < total:
        rate = config.rate * schedule(training.step, total, config.warm_up)
        for group, scale, share in zip(
            training.optimizer.param_groups, spread, SHARES, strict=True
        ):
            group["lr"] = rate * scale * share
        epoch, place = divmod(training.step, len(examples))
        batch = _order(len(examples), epoch, config.seed)[place : place + config.batch]
        training.optimizer.zero_grad()
        for index in batch:
            loss = kl_divergence(wmatrix, reader, training.parts, examples[index])
            (loss / len(batch)).backward()
            losses.append(loss.item())
        training.optimizer.step()
        training.step += len(batch)
        bar.update(len(batch))
        bar.set_postfix(kl=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
        if len(held_out) and training.step % len(examples) == 0:
            training.judge(judged(wmatrix, reader, training.parts, held_out))
            bar.write(f"epoch {epoch + 1}: divergence on held-out texts {training.scores[-1]:.4f}")
            if training.is_stuck(config.patience):
                break
        if training.step % config.save_every < len(batch):
            training.save(work)
    bar.close()
    parts = training.best if training.scores else training.parts
    return replace(
        wmatrix,
        encode=parts["encode"].detach().bfloat16(),
        decode=parts["decode"].detach().bfloat16(),
        bias=parts["bias"].detach(),
    ), training.scores


def schedule(step: int, total: int, warm_up: int) -> float:
    """The share of the full rate at a step: a linear rise, then a cosine's fall."""
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def judged(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], examples: CalibrationExamples
) -> float:
    """The mean divergence over lessons."""
    scores = [
        kl_divergence(wmatrix, reader, parts, examples[i]).item() for i in range(len(examples))
    ]
    return sum(scores) / len(scores)


def kl_divergence(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], lesson: CalibrationExample
) -> Tensor:
    """KL from the target's native prediction of the continuation to that after the memory."""
    encode, decode, bias = (parts[name].bfloat16() for name in PARTS)
    target, sink, count = reader.target_geometry, len(reader.sink), len(lesson.ids)
    flat = (lesson.features @ encode) @ decode + bias
    if wmatrix.manifest.residual:
        flat = flat + standing_states(wmatrix, lesson.features)
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    cache = build_cache(target, split_states(target, flat), sinks)
    end = sink + len(lesson.features)
    with only_tokens(reader.target_model, lesson.likely):
        logits = last_logits(
            reader.target_model,
            lesson.ids,
            count,
            past_key_values=cache,
            position_ids=torch.arange(end, end + count)[None],
        )
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(-1),
        lesson.native.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def standing_states(wmatrix: WMatrix, features: Tensor) -> Tensor:
    """The source's states [T, source_width], back from standardised features [T, F]."""
    width = wmatrix.manifest.source_width
    return features[:, :width] / wmatrix.scale[:width] + wmatrix.mean[:width]


@contextlib.contextmanager
def only_tokens(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """Within, the model's head has only these output tokens [N]; its other steps stay its own."""
    head = model.get_output_embeddings()
    narrow = torch.nn.Linear(1, 1, bias=False)
    narrow.weight = torch.nn.Parameter(head.weight[tokens], requires_grad=False)
    if head.bias is not None:
        narrow.bias = torch.nn.Parameter(head.bias[tokens], requires_grad=False)
    model.set_output_embeddings(narrow)
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def _order(count: int, epoch: int, seed: int) -> list[int]:
    """The order of the lessons in an epoch; the first takes them as they come."""
    if epoch == 0:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).tolist()
