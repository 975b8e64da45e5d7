"""Poison of every kind known, in a tenant's store and in a folder of W-Matrices.

Every file is as right as it can be but for its poison: the ID is that of its bytes, the payload
digest that of its tensors.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fuzz.container import Container, Part, assemble, encode
from fuzz.seeds import captured, geometry, random_wmatrix
from torch import Tensor

from awareness_vllm.errors import WMatrixCorrupt
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import LayerGeometry, Positions
from awareness_vllm.models.hf import sink_ids, sink_states
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix

STATES = "layers.3.value"
GENTLE = 0.02
"""A random map's states are then as large as a model's."""


@dataclass(frozen=True)
class Poison:
    """A poisoned memory and what is wrong with it. `harmless` is one that may be answered: what is
    strange about it is its own, or its load fails and its text is read natively."""

    kind: str
    memory: str
    harmless: bool = False


@functools.cache
def sink_of(model: Path) -> tuple[list[int], list[Tensor], list[Tensor]]:
    return (ids := sink_ids(model), *sink_states(model, ids))


def stranger(model: Path, text: str, name: str) -> tuple[Package, WMatrix]:
    """A package of a made-up source model, and a random map from that to a served model, whose sink
    is the model's own."""
    tokens = tokenize(load_tokenizer(str(model)), text)
    rope = Positions(scheme="rope", theta=1e4, rotary_dim=8)
    layers = tuple(LayerGeometry(heads=1, head_dim=8, positions=rope) for _ in range(4))
    target = geometry_of(model)
    source = geometry(name, target.vocab_size, layers)
    sink, keys, values = sink_of(model)
    wmatrix = random_wmatrix(source, target, tuple(sink))
    # A fit without measured r2: the canary has nothing to hold it against.
    manifest = wmatrix.manifest.model_copy(update={"r2": {}, "reconstruction_error": None})
    return captured(source, text, tokens, []), replace(
        wmatrix,
        manifest=manifest,
        encode=GENTLE * wmatrix.encode,
        sink_keys=keys,
        sink_values=values,
    )


def signed(file: Container) -> bytes:
    file.sign()
    return assemble(encode(file.header()), file.data())


def put(store: Path, raw: bytes) -> str:
    """Write a file under the ID of its bytes."""
    memory = f"mem_{hashlib.sha256(raw).hexdigest()[:32]}"
    (store / f"{memory}.safetensors").write_bytes(raw)
    return memory


def with_value(file: Container, value: float) -> Container:
    """One value of one layer replaced."""
    states = file.parts[STATES].tensor.clone()
    states.view(-1)[7] = value
    file.parts[STATES] = Part.of(states)
    return file


def with_tokens(file: Container, change: Callable[[Tensor], Tensor]) -> Container:
    file.parts["tokens"] = Part.of(change(file.parts["tokens"].tensor.clone()))
    return file


def middle(value: int) -> Callable[[Tensor], Tensor]:
    """Tokens with another id in the middle."""

    def change(tokens: Tensor) -> Tensor:
        tokens[len(tokens) // 2] = value
        return tokens

    return change


def renamed(file: Container, name: str) -> Container:
    document = file.document
    document["name"] = name
    file.document = document
    return file


CHANGES: dict[str, Callable[[Container], Any]] = {
    "NaN": lambda file: with_value(file, float("nan")),
    "infinity": lambda file: with_value(file, float("inf")),
    "3e38": lambda file: with_value(file, 3e38),
    "tokens of BOOL": lambda file: with_tokens(file, Tensor.bool),
    "tokens of float": lambda file: with_tokens(file, Tensor.float),
    "ids out of the vocabulary": lambda file: with_tokens(file, middle(10**6)),
    "negative ids": lambda file: with_tokens(file, middle(-1)),
    "a terminal's escapes in the name": lambda file: renamed(file, "\x1b[31mred\n"),
}
OF_COPIES: dict[str, Callable[[Container], Any]] = {
    "ids of another text": lambda file: with_tokens(file, lambda ids: ids.flip(0)),
    "a turn marker in the middle": lambda file: with_tokens(file, middle(1)),
}


def packages(copied: bytes, mapped: bytes, store: Path) -> list[Poison]:
    """Poisoned packages, made of a same-model one and of a stranger's."""
    found = []
    for origin, raw in (("copied", copied), ("mapped", mapped)):
        for kind, change in {**CHANGES, **(OF_COPIES if origin == "copied" else {})}.items():
            file = change(Container.parse(raw))
            found.append(Poison(f"{origin}: {kind}", put(store, signed(file))))
    whole = bytearray(copied)
    whole[-1000] ^= 1
    found.append(Poison("a flipped bit, under its own ID", put(store, bytes(whole)), harmless=True))
    found.append(Poison("random bytes", put(store, random.Random(0).randbytes(5000))))
    found.append(Poison("half a file", put(store, copied[: len(copied) // 2])))
    return found


def places(copied: bytes, victims: Path, store: Path) -> list[Poison]:
    """Files that are no files, larger than any store, somebody else's, or not what they are called.

    Args:
        victims: a store of another tenant, with packages.
    """
    theirs = sorted(victims.glob("mem_*.safetensors"))
    poisoned = signed(with_value(Container.parse(theirs[0].read_bytes()), float("nan")))
    (store / theirs[0].name).write_bytes(poisoned)
    (store / theirs[1].name).symlink_to(theirs[1])
    names = [f"mem_{number:032x}" for number in range(3)]
    (store / f"{names[0]}.safetensors").mkdir()
    os.mkfifo(store / f"{names[1]}.safetensors")
    (huge := store / f"{names[2]}.safetensors").write_bytes(copied)
    os.truncate(huge, 2**40)
    return [
        Poison("NaN under the ID of another tenant's memory", theirs[0].stem),
        Poison("a link to another tenant's memory", theirs[1].stem),
        Poison("a folder", names[0]),
        Poison("a pipe", names[1]),
        Poison("a terabyte", names[2]),
    ]


def forged_maps(
    model: Path, text: str, folder: Path, store: Path
) -> tuple[list[Poison], list[Poison]]:
    """Maps of strangers with a package each: values that are no numbers or far too large, and one
    that is merely random.

    Returns:
        those that a server starts with, and those that it refuses to start with.
    """
    changes: dict[str, Callable[[WMatrix], WMatrix]] = {
        "NaN": lambda w: replace(w, bias=torch.full_like(w.bias, float("nan"))),
        "3e38": lambda w: replace(w, decode=torch.full_like(w.decode, 3e38)),
        "1e30": lambda w: replace(w, bias=torch.full_like(w.bias, 1e30)),
        "a sink of 3e38": lambda w: replace(w, sink_keys=[s * 0 + 3e38 for s in w.sink_keys]),
        "a negative scale": lambda w: replace(w, scale=-w.scale),
        "random weights": lambda w: w,
    }
    usable, refused = [], []
    for number, (kind, change) in enumerate(changes.items()):
        package, wmatrix = stranger(model, text, f"forger-{number}")
        change(wmatrix).save(path := folder / f"forged-{number}.wmatrix")
        memory = publish(package, store).stem
        poison = Poison(f"a map with {kind}", memory, harmless=True)
        try:
            load_wmatrix(path)
            usable.append(poison)
        except WMatrixCorrupt:
            path.unlink()
            refused.append(poison)
    return usable, refused


def overwrite(path: Path) -> None:
    """A package's values made NaN where it lies; its size and its times stay."""
    stat, file = path.stat(), Container.parse(path.read_bytes())
    raw = signed(with_value(file, float("nan")))
    with path.open("r+b") as opened:
        opened.write(raw.ljust(stat.st_size, b" ")[: stat.st_size])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def spoil_disk_cache(folder: Path, rng: random.Random) -> int:
    """A value of each aligned memory made infinite or NaN, or half of the file zeroed; how many.
    A server that has found one spoilt may remove it at any time."""
    spoilt = 0
    for path in sorted(folder.glob("*.aligned")):
        with contextlib.suppress(FileNotFoundError):
            spoil(path, rng)
            spoilt += 1
    return spoilt


def spoil(path: Path, rng: random.Random) -> None:
    with path.open("r+b") as opened:
        raw = bytearray(opened.read())
        begin = 8 + int.from_bytes(raw[:8], "little")
        if rng.random() < 0.3:
            raw[len(raw) // 2 :] = bytes(len(raw) - len(raw) // 2)
        for _ in range(50):
            at = begin + 4 * rng.randrange((len(raw) - begin) // 4)
            raw[at : at + 4] = b"\xff\xff\xff\x7f"
        opened.seek(0)
        opened.write(raw)
