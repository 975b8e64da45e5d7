"""Calibration: training of the map through the target, on its predictions after the memory.

The ridge fits states; what counts are the target's predictions after them. Each step builds the
target's cache of the mapped states of some examples, and lowers the KL divergence from the
target's native predictions of the texts' continuations.
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
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.examples import CalibrationExample, CalibrationExamples
from awareness_vllm.fit.reader import Reader
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PARTS = ("encode", "decode", "bias")
SHARES = (0.2, 1.0, 1.0)
"""Each part's rate as a share of the decoder's: the encoder changes all outputs at once."""
BETAS = (0.9, 0.98)


WARM_UP = 10
"""Examples over which the rate rises."""
SAVE_EVERY = 50
"""Examples between two checkpoints."""


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
    """Examples seen."""

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
        note = {"step": self.step, "updates": max(updates, default=0), "scores": self.scores}
        checkpoint.save("calibration", tensors, note)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore the last save of a killed run, if there is one."""
        if (saved := checkpoint.load("calibration")) is None:
            return
        tensors, note = saved
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
) -> tuple[WMatrix, list[float]]:
    """Train encoder, decoder and bias by Adam; a killed training resumes from the checkpoint.

    After each epoch the map is scored on the held-out examples; training ends after
    `config.patience` epochs without a better score.

    Returns:
        the map with the best score on the held-out examples (the last one where there are none),
        and the scores: mean KL divergences before the first epoch and after each.
    """
    training = Training.start(wmatrix)
    training.resume(checkpoint)
    reader, total = examples.reader, config.epochs * len(examples)
    stds = [getattr(wmatrix, name).float().std().item() for name in PARTS]
    if len(held_out) and not training.scores:
        training.record(mean_kl(wmatrix, reader, training.parts, held_out))
    losses: list[float] = []
    bar = tqdm(total=total, initial=training.step, desc="calibration", disable=not progress)
    while training.step < total:
        rate = config.rate * schedule(training.step, total)
        for group, std, share in zip(training.optimizer.param_groups, stds, SHARES, strict=True):
            group["lr"] = rate * std * share
        epoch, begin = divmod(training.step, len(examples))
        batch = _order(len(examples), epoch, config.seed)[begin : begin + config.batch]
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
            training.record(mean_kl(wmatrix, reader, training.parts, held_out))
            bar.write(
                f"epoch {epoch + 1}: KL divergence on held-out texts {training.scores[-1]:.4f}"
            )
            if training.is_stalled(config.patience):
                break
        if training.step % SAVE_EVERY < len(batch):
            training.save(checkpoint)
    bar.close()
    parts = training.best if training.scores else training.parts
    return replace(
        wmatrix,
        encode=parts["encode"].detach().bfloat16(),
        decode=parts["decode"].detach().bfloat16(),
        bias=parts["bias"].detach(),
    ), training.scores


def schedule(step: int, total: int) -> float:
    """The share of the full rate at a step: a linear warm-up, then cosine decay."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / total))


@torch.no_grad()
def mean_kl(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], examples: CalibrationExamples
) -> float:
    """The mean KL divergence over examples."""
    scores = [
        kl_divergence(wmatrix, reader, parts, examples[i]).item() for i in range(len(examples))
    ]
    return sum(scores) / len(scores)


def kl_divergence(
    wmatrix: WMatrix, reader: Reader, parts: dict[str, Tensor], example: CalibrationExample
) -> Tensor:
    """KL divergence of the prediction after the memory from the native one, in nats per token."""
    encode, decode, bias = (parts[name].bfloat16() for name in PARTS)
    flat = (example.features @ encode) @ decode + bias
    if wmatrix.manifest.residual:
        flat = flat + source_states(wmatrix, example.features)
    sinks = wmatrix.sink_keys, wmatrix.sink_values
    with only_tokens(reader.target_model, example.likely):
        logits = reader.logits_after(sinks, flat, example.ids)
    return torch.nn.functional.kl_div(
        logits.float().log_softmax(-1),
        example.native.float().log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


def source_states(wmatrix: WMatrix, features: Tensor) -> Tensor:
    """The source's states [T, source_width] of standardised features [T, F]."""
    width = wmatrix.manifest.source_width
    return features[:, :width] / wmatrix.scale[:width] + wmatrix.mean[:width]


@contextlib.contextmanager
def only_tokens(model: PreTrainedModel, tokens: Tensor) -> Iterator[None]:
    """A context in which the model's head has only these output tokens [N]."""
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
    """The order of the examples in an epoch; in the first one unshuffled."""
    if epoch == 0:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(count, generator=generator).tolist()
