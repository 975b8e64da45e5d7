"""The kinds of work that `benchmarks/kills.py` kills, and how one tells what is whole."""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from awareness_vllm.align.realign import AlignedMemory
from awareness_vllm.cli import capture, fit  # noqa: F401  # what a child needs is imported once
from awareness_vllm.cli.main import main as awareness
from awareness_vllm.errors import AwarenessError, PackageCorrupt
from awareness_vllm.fit import calibrate, gather
from awareness_vllm.packages.capture import capture as captured
from awareness_vllm.packages.file import Package, publish, verify
from awareness_vllm.packages.origin import is_own
from awareness_vllm.packages.store import Store
from awareness_vllm.serving.tiers import DiskTier
from awareness_vllm.tensor_file import digest_of
from awareness_vllm.wmatrix.file import WMatrix, load

WORDS = ("memory", "key", "value", "layer", "head", "token", "window", "sink", "anchor", "latent")
SIZES = (20, 200, 2000, 3500)
"""Tokens of the texts; each is a byte."""
CACHE_BYTES = 10 * 2**20
MAPS = 3


@dataclass(frozen=True)
class Kind:
    """Work in a folder, done again and again until it is killed; the `next` command, which raises
    where it fails; and the names of what is `broken` after a kill."""

    name: str
    work: Callable[[Path, random.Random], None]
    next: Callable[[Path], None]
    broken: Callable[[Path], Iterator[str]]


class Material:
    """What all kinds work with, made once by `prepare`."""

    source: Path
    target: Path
    texts: list[Path]
    anchors: Path
    packages: list[Package]
    memories: dict[tuple[str, str], AlignedMemory]
    wmatrix: WMatrix
    """Of an undisturbed fit."""


def prepare(root: Path) -> None:
    """Make models, texts and packages, and import whatever the work imports late."""
    rng = random.Random(0)
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # a thread of its own otherwise, which would be lost in a fork
    gather.CHUNK_ROWS, calibrate.SAVE_EVERY = 200, 1  # a small fit has many checkpoints, too
    Material.source = _model(root / "source", hidden=32, layers=4)
    Material.target = _model(root / "target", hidden=48, layers=2)
    (root / "anchors").mkdir()
    Material.anchors = root / "anchors"
    for i in range(8):
        (Material.anchors / f"{i}.txt").write_text(_text(rng, 1500))
    Material.texts = [root / f"text-{size}" for size in SIZES]
    for path, size in zip(Material.texts, SIZES, strict=True):
        path.write_text(_text(rng, size))
    Material.packages = [captured(Material.source, path.read_text()) for path in Material.texts]
    Material.memories = {
        (f"{i:064x}", f"{i:064x}"): _memory(i, tokens) for i, tokens in enumerate(SIZES * 2)
    }
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report
        _fit(root / "reference.wmatrix")
    Material.wmatrix = load(root / "reference.wmatrix")


def _model(folder: Path, hidden: int, layers: int) -> Path:
    """A random model over bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
    )
    torch.manual_seed(hidden)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _text(rng: random.Random, size: int) -> str:
    return " ".join(rng.choices(WORDS, k=size))[:size]


def _memory(seed: int, tokens: int) -> AlignedMemory:
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(tokens, 2, 64, generator=generator).bfloat16() for _ in range(8)]
    return AlignedMemory(list(range(tokens)), states[:4], states[4:])


def _command(*argv: object) -> None:
    """A command of ours. Raises AssertionError where its status is not 0."""
    status = awareness([str(word) for word in argv])
    assert status == 0, f"awareness {argv[0]} ended with status {status}"


# Captures and publishes: a store


def _capture(folder: Path, rng: random.Random) -> None:
    text = rng.choice(Material.texts)
    _command("capture", "--model", Material.source, "--text", text, "--store", folder)


def _publish(folder: Path, rng: random.Random) -> None:
    publish(rng.choice(Material.packages), folder)


def _read_store_and_capture(folder: Path) -> None:
    """What a user does next: list, capture all texts anew, list them."""
    _command("list", "--store", folder)
    for text in Material.texts:
        _command("capture", "--model", Material.source, "--text", text, "--store", folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        _command("list", "--store", folder, "--json")
    rows = json.loads(printed.getvalue())["memories"]
    assert len(rows) == len(Material.texts), rows


def _broken_packages(folder: Path) -> Iterator[str]:
    """Packages that are listed and not whole, or not known as captured here."""
    store = Store(folder)
    for memory in store.ids():
        try:
            verify(path := store.path(memory))
        except PackageCorrupt as error:
            yield f"{memory}: {error}"
            continue
        if not is_own(digest_of(path)):
            yield f"{memory} has no seal"


# Fits


def _fit(out: Path) -> None:
    argv = ["fit", "--source", Material.source, "--target", Material.target, "--out", out]
    argv += ["--anchors", Material.anchors, "--tokens", 1200, "--rank", 6, "--calibration", 4]
    _command(*argv)


def _fit_again(folder: Path, rng: random.Random) -> None:
    _fit(folder / "fitted.wmatrix")


def _finish_fit(folder: Path) -> None:
    """The same fit goes on where it was killed, and gives what an undisturbed one gives."""
    _fit(folder / "fitted.wmatrix")
    fitted = load(folder / "fitted.wmatrix")
    for part in ("encode", "decode", "bias"):
        torch.testing.assert_close(getattr(fitted, part), getattr(Material.wmatrix, part))
    assert [path.name for path in folder.iterdir()] == ["fitted.wmatrix"], "the checkpoint is left"
    (folder / "fitted.wmatrix").unlink()


# Saves of W-Matrices


def _save(folder: Path, rng: random.Random) -> None:
    """Save one of some maps in the place of another."""
    seed, name = rng.randrange(2**16), rng.randrange(MAPS)
    _map(seed).save(folder / f"{name}.wmatrix")


def _map(seed: int) -> WMatrix:
    return replace(Material.wmatrix, bias=Material.wmatrix.bias + seed % 4093)  # plausible


def _load_and_save(folder: Path) -> None:
    for name in range(MAPS):
        _map(name).save(folder / f"{name}.wmatrix")
        assert torch.equal(load(folder / f"{name}.wmatrix").bias, _map(name).bias)


def _broken_maps(folder: Path) -> Iterator[str]:
    for path in folder.glob("*.wmatrix"):
        try:
            load(path)
        except AwarenessError as error:
            yield f"{path.name}: {error}"


# The disk cache


def _tier(folder: Path) -> DiskTier:
    return DiskTier(folder, CACHE_BYTES, "model", torch.bfloat16)


def _put(folder: Path, rng: random.Random) -> None:
    """Put some memories, more than there is room for, and read others."""
    tier, keys = _tier(folder), list(Material.memories)
    for _ in range(4):
        tier.put(key := rng.choice(keys), Material.memories[key])
        tier.get(rng.choice(keys))
    tier.thread.shutdown()


def _put_and_get(folder: Path) -> None:
    tier = _tier(folder)
    key = next(iter(Material.memories))
    tier.put(key, Material.memories[key])
    tier.thread.shutdown()
    assert tier.get(key) is not None


def _broken_memories(folder: Path) -> Iterator[str]:
    """Memories that come back otherwise than they were put. A missing one is none."""
    before = set(folder.glob("*.aligned"))
    tier = _tier(folder)
    for key, expected in Material.memories.items():
        if (memory := tier.get(key)) is None:
            continue
        found = memory.ids == expected.ids and all(
            torch.equal(one, other)
            for one, other in zip(
                memory.keys + memory.values, expected.keys + expected.values, strict=True
            )
        )
        if not found:
            yield key[0]
    tier.thread.shutdown()
    yield from (f"{path.name} was dropped" for path in before - set(folder.glob("*.aligned")))


KINDS = (
    Kind("capture", _capture, _read_store_and_capture, _broken_packages),
    Kind("publish", _publish, _read_store_and_capture, _broken_packages),
    Kind("fit", _fit_again, _finish_fit, _broken_maps),
    Kind("save", _save, _load_and_save, _broken_maps),
    Kind("disk cache", _put, _put_and_get, _broken_memories),
)
