"""Small real language models, one for each positional encoding, trained by this script.

    python benchmarks/small_models.py [--short] [NAME …]

Every model has about a million parameters, the same small BPE and the same texts (the installed
anchors; never the held-out sources), and is saved in `$AWARENESS_HOME/models/small/NAME` in Hugging
Face's format, as vLLM serves it. Saved models are reused; a killed training is resumed.

Trained on text alone for minutes, a model hardly attends to its context, and a memory is worth
little. So most sequences quote themselves: a stretch of real text is followed by spans of it,
between a few further words. And sequences are short at first: in 64 tokens copying is learned after
some 400 steps of 2,048 tokens, in 512 not after 500 of 4,096; later it extends to longer ones. The
last phases have more and more plain text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm

from awareness_vllm.anchors.corpus import load, windows
from awareness_vllm.files import anchors_dir, models_dir
from awareness_vllm.fit.checkpoint import Checkpoint
from awareness_vllm.models.position_embeddings import TABLES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GENERATED = frozenset({"facts", "mathematics"})
"""Anchors that are generated, not real text."""
BOS = "<|endoftext|>"
VOCABULARY, POSITIONS, HIDDEN, LAYERS, HEADS = 2048, 1024, 128, 4, 4
WINDOW = 128

Recipe = Callable[[], "PreTrainedConfig"]
RECIPES: dict[str, Recipe] = {}


@dataclass(frozen=True)
class Course:
    """The training of a model. Each of the `phases` has a number of steps, the tokens of a sequence
    and the share of plain text; a step has `batch` tokens, from `characters` of text. The rate
    falls over the last `fall` of all steps."""

    phases: tuple[tuple[int, int, float], ...] = (
        (550, 64, 0.1),
        (100, 128, 0.1),
        (100, 256, 0.4),
        (300, 512, 0.6),
    )
    batch: int = 2048
    rate: float = 5e-3
    warm_up: int = 20
    fall: float = 0.4
    characters: int = 6_000_000
    save_every: int = 50

    @property
    def steps(self) -> int:
        return sum(steps for steps, _, _ in self.phases)

    def phase(self, step: int) -> tuple[int, float]:
        """Tokens of a sequence at a step, and the share of plain ones."""
        ends = itertools.accumulate(steps for steps, _, _ in self.phases)
        return next(p[1:] for p, end in zip(self.phases, ends, strict=True) if step < end)

    def share(self, step: int) -> float:
        """The share of the full rate at a step: warm-up, constant, decay."""
        left = (1 - step / self.steps) / self.fall
        return min(1.0, (step + 1) / self.warm_up, left)


LATE = Course(phases=((1100, 64, 0.1), (400, 128, 0.1), (500, 256, 0.4), (1500, 512, 0.6)))
COURSES = {"learned": LATE}
"""Longer trainings, of models that learn to copy later than the others."""
SHORT = Course(phases=((80, 64, 0.1), (20, 128, 0.1)), batch=512, characters=200_000)
QUOTED = 0.8
"""The share of quotes among the later parts of a sequence."""


def recipe(name: str) -> Callable[[Recipe], Recipe]:
    """Register a model's configuration under its name."""

    def register(function: Recipe) -> Recipe:
        RECIPES[name] = function
        return function

    return register


def rotary(**fields: Any) -> dict[str, Any]:
    """The common configuration of Llama and Mistral."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **fields,
    }


@recipe("target")
def target() -> PreTrainedConfig:
    """RoPE with another theta, two KV heads instead of four: the target of all maps."""
    from transformers import LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    return LlamaConfig(**rotary(num_key_value_heads=2, rope_parameters=rope))


@recipe("rope")
def rope() -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**rotary())


@recipe("learned")
def learned() -> PreTrainedConfig:
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


@recipe("alibi")
def alibi() -> PreTrainedConfig:
    from transformers import BloomConfig

    return BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=0,
        eos_token_id=0,
    )


@recipe("window")
def window() -> PreTrainedConfig:
    from transformers import MistralConfig

    return MistralConfig(**rotary(sliding_window=WINDOW))


def folder_of(name: str, *, short: bool = False) -> Path:
    """The folder of a small model."""
    return models_dir() / ("small-short" if short else "small") / name


def texts(characters: int) -> list[str]:
    """About `characters` characters of the anchors' real texts, sampled from all of them."""
    sources = sorted(p for p in anchors_dir().iterdir() if p.name not in GENERATED)
    pieces = [piece for document in load(sources) for piece in windows(document, 4000)]
    picked: list[str] = []
    for i in np.random.default_rng(0).permutation(len(pieces)):
        picked.append(pieces[i])
        characters -= len(pieces[i])
        if characters <= 0:
            break
    return picked


def bpe(pieces: Sequence[str]) -> Tokenizer:
    """Byte-level BPE that puts its BOS before any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def sequence(rng: np.random.Generator, corpus: np.ndarray, length: int, plain: float) -> list[int]:
    """BOS and text, [length] ids; but for a `plain` share, with quotes of the text before."""

    def passage(count: int) -> list[int]:
        begin = rng.integers(max(1, len(corpus) - count))
        return corpus[begin : begin + count].tolist()

    if rng.random() < plain:
        return [0, *passage(length - 1)]
    ids = [0, *passage(int(rng.integers(length // 4, length // 2)))]
    while len(ids) < length:
        if rng.random() < QUOTED:
            begin = int(rng.integers(1, max(2, len(ids) - 8)))
            ids += ids[begin : begin + int(rng.integers(8, max(16, length // 4)))]
        else:
            ids += passage(int(rng.integers(1, max(8, length // 16))))
    return ids[:length]


def is_learned(model: Any) -> bool:
    return model.config.model_type in TABLES


@torch.no_grad()
def begin_as_waves(model: Any) -> None:
    """Initialise learned positions as sinusoids, twice as large as embeddings: attending to the
    previous token is then one rotation for all positions, not to be learned at each alone."""
    table = model.base_model.get_submodule(TABLES[model.config.model_type]).weight
    count, width = table.shape
    waves = 10_000.0 ** (torch.arange(0, width, 2) / width)
    angles = torch.arange(count)[:, None] / waves
    size = model.get_input_embeddings().weight.std() * 2**1.5
    table.copy_(torch.cat((angles.sin(), angles.cos()), dim=1) * size)


def optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which takes half the steps; Adam for the rest."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inner = weight.dim() == 2 and (".layers." in name or ".h." in name)
        (matrices if inner else others).append(weight)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)]


def train(
    model: Any, corpus: np.ndarray, course: Course, seed: int, checkpoint: Checkpoint
) -> float:
    """Train a model to the course's end; the loss of the last steps."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    steppers = optimizers(model, course.rate)
    losses: list[float] = []
    begin = resume(model, steppers, checkpoint)
    for step in (bar := tqdm(range(begin, course.steps), initial=begin, total=course.steps)):
        rng = np.random.default_rng((seed, step))
        length, plain = course.phase(step)
        batch = [sequence(rng, corpus, length, plain) for _ in range(course.batch // length)]
        ids = torch.tensor(batch, device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = course.rate * course.share(step)
            stepper.step()
            stepper.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{np.mean(losses[-20:]):.3f}")
        if (step + 1) % course.save_every == 0:
            save_training(model, steppers, checkpoint, step + 1)
    return float(np.mean(losses[-20:])) if losses else float("nan")


def save_training(
    model: Any, steppers: Sequence[torch.optim.Optimizer], checkpoint: Checkpoint, step: int
) -> None:
    """Save the state of a training."""
    tensors: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        tensors[f"weight/{name}"] = weight.detach()
        for stepper in steppers:
            for field, value in stepper.state.get(weight, {}).items():
                tensors[f"state/{field}/{name}"] = torch.as_tensor(value)
    checkpoint.save(
        "training", {name: t.clone().contiguous() for name, t in tensors.items()}, {"step": step}
    )


def resume(model: Any, steppers: Sequence[torch.optim.Optimizer], checkpoint: Checkpoint) -> int:
    """Restore a killed training; the step to continue from."""
    if (saved := checkpoint.load("training")) is None:
        return 0
    tensors, note = saved
    weights = dict(model.named_parameters())
    owner = {id(w): s for s in steppers for group in s.param_groups for w in group["params"]}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "weight":
            weights[rest].data.copy_(tensor)
        else:
            field, _, name = rest.partition("/")
            owner[id(weights[name])].state[weights[name]][field] = tensor.to(
                weights[name].device if tensor.dim() else "cpu"
            )
    return int(note["step"])


def make(name: str, *, short: bool = False) -> Path:
    """The folder of a model, trained unless saved by an earlier run."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = folder_of(name, short=short)
    if (folder / "training.json").is_file():
        return folder
    course = SHORT if short else COURSES.get(name, Course())
    seed = zlib.crc32(name.encode())
    pieces = texts(course.characters)
    tokenizer = bpe(pieces)
    corpus = np.concatenate([e.ids for e in tokenizer.encode_batch(pieces)]).astype(np.int64)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(RECIPES[name](), dtype=torch.float32)
    if is_learned(model):
        begin_as_waves(model)
    note = {"name": name, "seed": seed, **asdict(course)}
    checkpoint = Checkpoint(folder.with_name(f".{name}.work"), json.dumps(note))
    started = time.process_time()
    note["loss"] = train(model, corpus, course, seed, checkpoint)
    note["cpu_seconds"] = round(time.process_time() - started)
    note["parameters"] = sum(p.numel() for p in model.parameters())
    model.cpu().to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS
    ).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(note, indent=1) + "\n")
    checkpoint.remove()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--short", action="store_true", help="a few steps: that it runs, for CI")
    args = parser.parse_args()
    for name in args.names or RECIPES:
        folder = make(name, short=args.short)
        print(f"{folder}: {(folder / 'training.json').read_text()}")


if __name__ == "__main__":
    main()
