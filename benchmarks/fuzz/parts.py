"""Mutations of tensors: values, dtypes, shapes, names; token ids, spans and text."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from fuzz.container import DOCUMENT as KEY
from fuzz.container import DTYPES, Container, Part
from fuzz.registry import ALWAYS, CONTENT, PACKAGE, PARTS, SERVER, WMATRIX, Rng, kind

CODE = ("tokens", "spans", "text")
TURN = 4
"""The id of `<turn>` in the seeds' target."""


def states(file: Container) -> list[str]:
    """The names of all tensors of floats."""
    return [name for name, part in file.parts.items() if part.tensor.is_floating_point()]


def poke(rng: Rng, file: Container, value: float, share: float | None = None) -> Container:
    """One value of one tensor, or a share of them, replaced."""
    name = rng.choice(states(file))
    tensor = file.parts[name].tensor.clone()
    flat = tensor.reshape(-1)
    if not len(flat):
        name = states(file)[0]
        tensor = file.parts[name].tensor.clone()
        flat = tensor.reshape(-1)
    count = max(1, int((share or 0) * len(flat)))
    flat[torch.tensor(rng.sample(range(len(flat)), count))] = value
    file.parts[name] = Part.of(tensor)
    return file


@kind(PARTS, refuse=CONTENT)
def nan(rng: Rng, file: Container) -> Container:
    return poke(rng, file, float("nan"), rng.choice([None, 0.5, 1.0]))


@kind(PARTS, refuse=CONTENT)
def infinity(rng: Rng, file: Container) -> Container:
    return poke(rng, file, rng.choice([1, -1]) * float("inf"), rng.choice([None, 0.5, 1.0]))


@kind(PARTS)
def huge(rng: Rng, file: Container) -> Container:
    """Finite as it stands: what attention computes from it is not. A token or a dim that no map
    reads may have it."""
    return poke(rng, file, rng.choice([1, -1]) * rng.choice([3e38, 1e30, 1e20]))


@kind(PARTS)
def denormal(rng: Rng, file: Container) -> Container:
    return poke(rng, file, rng.choice([1e-40, -1e-45, 0.0, -0.0]), rng.choice([None, 1.0]))


@kind(PARTS)
def larger(rng: Rng, file: Container) -> Container:
    """A tensor, or one value of it, some times larger: up to what the reader still believes."""
    name = rng.choice(states(file))
    tensor = file.parts[name].tensor
    factor = rng.choice([10.0, 1e3, 1e5, 1e8])
    file.parts[name] = Part.of((tensor.float() * factor).to(tensor.dtype))
    return file


@kind(PARTS, refuse=ALWAYS)
def dtype_relabelled(rng: Rng, file: Container) -> Container | None:
    """The same bytes under another dtype of the same size."""
    name = rng.choice(sorted(file.parts))
    part = file.parts[name]
    size = DTYPES[part.dtype].itemsize
    others = [n for n, t in DTYPES.items() if t.itemsize == size and n != part.dtype]
    part.dtype = rng.choice(others)
    return file


@kind(PARTS, refuse=ALWAYS)
def dtype_converted(rng: Rng, file: Container) -> Container:
    """The same values in another dtype, shapes unchanged: BOOL tokens among them."""
    name = rng.choice(sorted(name for name, part in file.parts.items() if part.data))
    tensor = file.parts[name].tensor
    allowed = {tensor.dtype}
    if "encode" in file.parts:
        allowed |= {torch.float32, torch.bfloat16, torch.float16}  # maps may be in either
    others = [t for t in DTYPES.values() if t not in allowed]
    file.parts[name] = Part.of(tensor.double().to(rng.choice(others)))
    return file


@kind(PARTS, files=PACKAGE, refuse=ALWAYS)
def tokens_of_bool(rng: Rng, file: Container) -> Container:
    file.parts["tokens"] = Part.of(file.parts["tokens"].tensor.bool())
    return file


@kind(PARTS, refuse=ALWAYS)
def part_missing(rng: Rng, file: Container) -> Container:
    del file.parts[rng.choice(sorted(file.parts))]
    return file


@kind(PARTS, refuse=ALWAYS)
def part_added(rng: Rng, file: Container) -> Container:
    name = rng.choice(
        ["extra", "layers.99.key", "layers.-1.key", "layers.0.KEY", "", "\x1b[2J", "x" * 10_000,
         "../../x", "layers.00.key", "sink.99.key", "places.source"]
    )  # fmt: skip
    file.parts[name] = Part("U8", [size := rng.choice([0, 1, 300_000, 5_000_000])], bytes(size))
    return file


@kind(PARTS, refuse=ALWAYS)
def thousands_of_parts(rng: Rng, file: Container) -> Container:
    for number in range(rng.choice([1000, 20_000])):
        file.parts[f"extra.{number}"] = Part("U8", [0], b"")
    return file


@kind(PARTS)
def parts_swapped(rng: Rng, file: Container) -> Container:
    """Two tensors under each other's name: of the same shape they may be served."""
    one, other = rng.sample(sorted(file.parts), 2)
    file.parts[one], file.parts[other] = file.parts[other], file.parts[one]
    return file


@kind(PARTS, refuse=ALWAYS)
def shape_changed(rng: Rng, file: Container) -> Container | None:
    """As many values in another shape, or fewer or more of them."""
    name = rng.choice(sorted(name for name, part in file.parts.items() if part.data))
    part = file.parts[name]
    tensor = part.tensor
    shapes = [[1, *part.shape], [*part.shape, 1], part.shape[::-1], [tensor.numel()], []]
    fitting = [shape for shape in shapes if shape != part.shape and (shape or tensor.numel() == 1)]
    change = rng.randrange(3)
    if change == 0:
        part.shape = rng.choice(fitting)
    elif name == "text":
        return None
    elif change == 1:
        file.parts[name] = Part.of(tensor[:-1].clone())
    else:
        file.parts[name] = Part.of(torch.cat((tensor, tensor[-1:])))
    return file


@kind(PARTS, refuse=ALWAYS)
def shape_without_bytes(rng: Rng, file: Container) -> Container:
    """A shape that the bytes contradict."""
    part = file.parts[rng.choice(sorted(name for name, p in file.parts.items() if p.data))]
    part.shape = rng.choice(
        [[2**62], [2**32, 2**32], [-1], [10**30], [1] * 1000, [*part.shape, 2], [0], [2**63, 0]]
    )
    return file


@kind(PARTS, files=PACKAGE, refuse=CONTENT)
def ids_out_of_the_vocabulary(rng: Rng, file: Container) -> Container:
    return with_id(rng, file, rng.choice([10**6, 2**31 - 1, -1, -(2**31), -100]))


@kind(PARTS, files=PACKAGE)
def ids_of_others(rng: Rng, file: Container) -> Container:
    """Other ids of the source's vocabulary: a server that does not know the source's tokenizer
    cannot tell, and does not use them."""
    return with_id(rng, file, rng.randrange(200))


@kind(PARTS, files=PACKAGE, refuse=SERVER)
def ids_of_others_in_a_copy(rng: Rng, file: Container) -> Container | None:
    """Ids that are not the text's; these are what the model would be said to have read."""
    old = file.parts["tokens"].data
    changed = with_id(rng, file, rng.randrange(200))
    return changed if is_copy(file) and file.parts["tokens"].data != old else None


def is_copy(file: Container) -> bool:
    """Whether the states are the served model's own."""
    return file.document["geometry"]["name"] == "target"


def with_id(rng: Rng, file: Container, value: int) -> Container:
    tokens = file.parts["tokens"].tensor.clone()
    tokens[rng.randrange(len(tokens))] = value
    file.parts["tokens"] = Part.of(tokens)
    return file


@kind(PARTS, files=PACKAGE, refuse=SERVER)
def special_ids_in_a_copy(rng: Rng, file: Container) -> Container | None:
    """A turn marker in the middle of a same-model memory."""
    return with_id(rng, file, TURN) if is_copy(file) else None


@kind(PARTS, files=PACKAGE, refuse=CONTENT)
def spans_out_of_the_text(rng: Rng, file: Container) -> Container | None:
    spans = file.parts["spans"].tensor.clone()
    row, value = rng.randrange(len(spans)), rng.choice([10**6, 2**62, -1, -(2**63)])
    spans[row, rng.randrange(2)] = value
    file.parts["spans"] = Part.of(spans)
    return file


@kind(PARTS, files=PACKAGE, refuse=CONTENT)
def spans_backwards(rng: Rng, file: Container) -> Container | None:
    spans = file.parts["spans"].tensor.clone()
    if not spans.any():
        return None
    choice = rng.randrange(3)
    if choice == 0:
        spans = spans.flip(0)
    elif choice == 1:
        spans = spans.flip(1)
    else:
        row = rng.choice([i for i in range(len(spans)) if spans[i, 0] != spans[i, 1]])
        spans[row] = spans[row].flip(0)
    file.parts["spans"] = Part.of(spans)
    return file


def with_text(file: Container, raw: bytes) -> Container:
    file.parts["text"] = Part("U8", [len(raw)], raw)
    return file


@kind(PARTS, files=PACKAGE, refuse=CONTENT)
def text_not_utf8(rng: Rng, file: Container) -> Container | None:
    raw = bytearray(file.parts["text"].data)
    if not raw:
        return None
    raw[rng.randrange(len(raw))] = rng.choice([0xFF, 0xC0, 0xFE])
    return with_text(file, bytes(raw))


@kind(PARTS, files=PACKAGE, refuse=SERVER)
def text_of_others_in_a_copy(rng: Rng, file: Container) -> Container | None:
    return text_of_others(rng, file) if is_copy(file) else None


@kind(PARTS, files=PACKAGE)
def text_of_others(rng: Rng, file: Container) -> Container:
    """Another text, control characters, or nothing, beside the same tokens and spans."""
    raw = file.parts["text"].data
    texts = [b"", raw[::-1] if raw.isascii() else raw[:10], b"\x00" * len(raw), b"\x1b[31m" + raw]
    return with_text(file, rng.choice([*texts, b"<turn>" + raw, raw + b"<bos>", b"x" * len(raw)]))


@kind(PARTS, files=PACKAGE, refuse=CONTENT)
def text_of_megabytes(rng: Rng, file: Container) -> Container:
    """A text that its few tokens cannot have: to tokenise it would take seconds."""
    return with_text(file, rng.choice([b"x", b" ", b"ab ", "日本".encode()]) * 1_000_000)


@kind(PARTS, files=PACKAGE)
def odd_but_consistent(rng: Rng, file: Container) -> Container:
    """Geometries that manifest and tensors agree on: no tokens, no layers, odd or empty heads."""
    tree = file.document
    if tree.get("first_tokens") or tree.get("latent"):
        return with_id(rng, file, 7)
    change, geometry = rng.randrange(4), tree["geometry"]
    for i, layer in enumerate(geometry["layers"]):
        for part in ("key", "value"):
            rows = file.parts[name := f"layers.{i}.{part}"].tensor
            if change == 0:
                rows = rows[:0]
            elif change == 1:
                rows = rows[:, :, :3]
            elif change == 2:
                rows = rows[:, :0]
            file.parts[name] = Part.of(rows.clone())
        layer["heads"], layer["head_dim"] = rows.shape[1], rows.shape[2]
    if change == 0:
        tree["tokens"] = 0
        for name in ("tokens", "spans"):
            file.parts[name] = Part.of(file.parts[name].tensor[:0].clone())
    if change == 3:
        geometry["layers"] = []
        file.parts = {name: part for name, part in file.parts.items() if name in CODE}
    file.metadata[KEY] = json.dumps(tree)
    return file


@kind(PARTS, files=WMATRIX, refuse=SERVER)
def statistics_forged(rng: Rng, file: Container) -> Container:
    """Means and scales that make features of any memory implausible."""
    name = rng.choice(["mean", "scale"])
    value = rng.choice([-1e4, 1e9]) if name == "mean" else rng.choice([0.0, -1.0, 1e9])
    file.parts[name] = Part.of(torch.full_like(file.parts[name].tensor, value))
    return file


def large(rng: Rng, like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value) * torch.randn(like.shape, generator=torch.manual_seed(1))


@kind(PARTS, files=WMATRIX)
def weights_forged(rng: Rng, file: Container) -> Container:
    """Finite weights whose products are beyond a cache's dtype."""
    for name in rng.choice([["encode"], ["decode"], ["encode", "decode"], ["bias"]]):
        if f"{name}_scale" in file.parts:  # of a map in int8
            name = f"{name}_scale"
        tensor = large(rng, file.parts[name].tensor, rng.choice([1e3, 1e10, 1e18]))
        file.parts[name] = Part.of(tensor)
    return file
