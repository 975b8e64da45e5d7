"""Arguments of the operators for some heads, and what their results are compared with.

Tolerances are the reference's own rounding: what the same operation in the kernel's dtypes loses
against float64, and a little more where sums are added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from awareness_kernels import reference
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter is slow: `make unit` leaves it to `make test`.
Kernels = dict[str, Callable[..., Any]]
SLACK = 1.5
POISON = 77.0
POISON_IN = {
    d: torch.tensor(POISON).to(d).float().item()
    for d in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}


@dataclass(frozen=True)
class Shape:
    """A model's side: layers of `heads` × `dims`, the first `turned` pairs of dims rotary."""

    layers: int
    heads: int
    dims: int
    rotated: int
    interleaved: bool = False


PLAIN = Shape(2, 3, 64, 32)
PARTIAL = Shape(1, 2, 80, 16)
INTERLEAVED = Shape(2, 1, 32, 8, interleaved=True)
STILL = Shape(1, 2, 40, 0)
WIDE = Shape(1, 1, 256, 128)


def tables(shape: Shape, positions: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Angles that differ by pair; with a scale, as YaRN's."""
    angles = torch.arange(positions)[:, None] * torch.linspace(0.9, 0.01, shape.rotated)[None]
    return (scale * angles.cos()).contiguous(), (scale * angles.sin()).contiguous()


def states(shape: Shape, tokens: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (tokens, shape.heads, shape.dims)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(shape.layers)]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def doubled(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments, every floating tensor in float64."""
    return each(arguments, lambda x: x.double() if x.is_floating_point() else x)


def copied(arguments: Sequence[Any]) -> list[Any]:
    return each(arguments, lambda x: x.clone())  # strides are kept


def each(arguments: Sequence[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    """The same arguments with every tensor changed, in lists too."""

    def changed(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [changed(item) for item in x]
        return change(x) if isinstance(x, Tensor) else x

    return [changed(argument) for argument in arguments]


def there(items: list[Tensor]) -> list[Tensor]:
    return [item.to(DEVICE) for item in items]


def encode_arguments(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    *,
    predecessors: int = 2,
    rank: int = 24,
    embed: int = 20,
    scale: float = 1.0,
) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens)
    held = tokens + 5
    cos, sin = tables(shape, held, scale)
    features = 2 * shape.layers * shape.heads * shape.dims + (1 + predecessors) * embed

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    return [
        there(states(shape, held, dtype, 1)),
        there(states(shape, held, dtype, 2)),
        there([cos] * shape.layers),
        there([sin] * shape.layers),
        [int(shape.interleaved)] * shape.layers,
        torch.randint(held, (tokens,), generator=generator).to(DEVICE),
        (torch.rand(tokens, generator=generator) < 0.2).to(DEVICE),
        torch.randint(30, (tokens + 2,), generator=generator).to(DEVICE),
        random(30, embed).to(dtype),
        0.3 * random(features),
        random(features).abs() + 0.5,
        (0.05 * random(features, rank)).to(dtype),
        predecessors,
        2,
    ]


def check_encode(kernels: Kernels, arguments: list[Any]) -> None:
    exact = reference.encode_states(*doubled(arguments))
    plain = reference.encode_states(*arguments)
    found = kernels["encode_states"](*arguments)
    assert found.dtype == plain.dtype
    assert found.isfinite().all()
    assert error(found, exact) <= SLACK * error(plain, exact)


@dataclass
class Pages:
    """One layer's cache, [pages, page size, H, D] by strides of some physical order, poisoned."""

    shape: tuple[int, int, int, int]
    order: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        physical = torch.full([self.shape[i] for i in self.order], POISON, device=DEVICE)
        return physical.to(self.dtype).permute([self.order.index(i) for i in range(4)])


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)]
"""Page by page, head by head, and transposed within the head as vLLM's CPU keeps keys."""


def decode_arguments(
    shape: Shape,
    tokens: int,
    dtype: torch.dtype,
    *,
    pages: torch.dtype | None = None,
    order: tuple[int, ...] = ORDERS[0],
    sink: int = 1,
    rank: int = 40,
    scale: float = 1.0,
) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens + 7)
    rows, size = sink + tokens, 16
    cos, sin = tables(shape, rows + 3)
    count = rows // size + 3
    outputs = 2 * shape.layers * shape.heads * shape.dims

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    def slot_mapping() -> Tensor:
        """Blocks in random order, the last one partial, some rows of none."""
        blocks = torch.randperm(count, generator=generator)
        at = torch.arange(rows)
        slot = blocks[at // size] * size + at % size
        slot[torch.rand(rows, generator=generator) < 0.15] = -1
        slot[slot == 0] = -1  # where a stray row would land
        return slot.to(DEVICE)

    place = Pages((count, size, shape.heads, shape.dims), order, pages or dtype)
    return [
        random(tokens, rank).to(dtype),
        (0.2 * random(rank, outputs)).to(dtype),
        random(outputs),
        torch.arange(rows).to(DEVICE) + 2,
        [cos.to(DEVICE)] * shape.layers,
        [sin.to(DEVICE)] * shape.layers,
        [int(shape.interleaved)] * shape.layers,
        there(states(shape, sink, torch.float32, 3)),
        there(states(shape, sink, torch.float32, 4)),
        [place.empty() for _ in range(shape.layers)],
        [place.empty() for _ in range(shape.layers)],
        [slot_mapping() for _ in range(shape.layers)],
        scale * (1 + torch.arange(2 * shape.layers, device=DEVICE) / 4),
    ]


def check_decode(kernels: Kernels, arguments: list[Any]) -> None:
    runs = [copied(arguments) for _ in range(2)]
    reference.decode_paged(*runs[0])
    kernels["decode_paged"](*runs[1])
    exact = doubled(arguments)
    reference.decode_paged(*exact)
    layers = len(arguments[9])
    for part in (9, 10):
        for layer in range(layers):
            compare(*(run[part][layer] for run in (*runs, exact)), arguments[11][layer])


def compare(plain: Tensor, found: Tensor, exact: Tensor, slot_mapping: Tensor) -> None:
    """Every slot that was named is as right as the reference's; every other one is untouched."""
    named = torch.zeros(plain.shape[:2], dtype=torch.bool, device=plain.device)
    real = slot_mapping[slot_mapping >= 0]
    named[real // plain.shape[1], real % plain.shape[1]] = True
    assert (found[~named].float() == POISON_IN[found.dtype]).all()
    if named.any():
        plain, found, exact = (pages[named].double() for pages in (plain, found, exact))
        assert error(found, exact) <= SLACK * error(plain, exact) + 1e-9


def check_rotate(
    kernels: Kernels, pages: list[Tensor], slot_mapping: list[Tensor], rest: list[Any]
) -> None:
    plain, found = ([page.clone() for page in pages] for _ in range(2))
    exact = [page.double() for page in pages]
    reference.rotate_paged(plain, slot_mapping, *rest)
    kernels["rotate_paged"](found, slot_mapping, *rest)
    reference.rotate_paged(*doubled([exact, slot_mapping, *rest]))
    for layer in range(len(pages)):
        compare(plain[layer], found[layer], exact[layer], slot_mapping[layer])
