"""The Triton kernels against the float64 reference: in the interpreter here, on a GPU under `gpu`.

Tolerances are the reference's own rounding: what the same operation in the kernel's dtypes loses
against float64, and a little more where sums are added up in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from awareness_kernels import ops, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter is slow: `make unit` leaves it to `make test`.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.unit, pytest.mark.slow]

Kernels = dict[str, Callable[..., Any]]
SLACK = 1.5
POISON = 77.0
POISON_IN = {
    d: torch.tensor(POISON).to(d).float().item()
    for d in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
}
CHECKS = ("test_schema", "test_faketensor")


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


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    """The launchers; without a GPU, tests/conftest.py has their kernels interpreted."""
    from awareness_kernels import decode, encode, rotate

    return {
        "encode_states": encode.encode_states,
        "decode_paged": decode.decode_paged,
        "rotate_paged": rotate.rotate_paged,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [PLAIN, PARTIAL, INTERLEAVED, STILL, WIDE])
def test_encode(kernels: Kernels, shape: Shape, dtype: torch.dtype) -> None:
    check_encode(kernels, encode_arguments(shape, 63, dtype))


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        (1, {}),
        (129, {}),
        (15, {"predecessors": -1}),
        (15, {"predecessors": 0, "rank": 150}),
        (15, {"scale": 1.3}),
    ],
)
def test_encode_of_awkward_sizes(kernels: Kernels, tokens: int, changes: dict[str, Any]) -> None:
    check_encode(kernels, encode_arguments(PARTIAL, tokens, torch.bfloat16, **changes))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [PLAIN, PARTIAL, INTERLEAVED, STILL, WIDE])
def test_decode(kernels: Kernels, shape: Shape, dtype: torch.dtype) -> None:
    check_decode(kernels, decode_arguments(shape, 63, dtype))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tokens", "sink"), [(1, 1), (15, 0), (129, 1), (15, 17)])
def test_decode_into_any_order(
    kernels: Kernels, order: tuple[int, ...], tokens: int, sink: int
) -> None:
    arguments = decode_arguments(PARTIAL, tokens, torch.bfloat16, order=order, sink=sink)
    check_decode(kernels, arguments)


def test_decode_into_fp8(kernels: Kernels) -> None:
    pages = torch.float8_e4m3fn
    check_decode(kernels, decode_arguments(PLAIN, 15, torch.bfloat16, pages=pages, scale=0.25))


STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", STORED)
def test_pages_get_finite_numbers_alone(kernels: Kernels, dtype: torch.dtype) -> None:
    """Whatever the map and the sink hold: others will use the blocks again."""
    strange = torch.tensor([float("nan"), float("inf"), -3e38])
    for write in (reference.decode_paged, kernels["decode_paged"]):
        arguments = decode_arguments(STILL, 1, torch.float32, pages=dtype)
        arguments[2][:3] = arguments[7][0][0, 0, :3] = strange
        arguments[11], arguments[12][:] = [torch.tensor([5, 6], device=DEVICE)], 1
        write(*arguments)
        keys = arguments[9][0].flatten(0, 1)[5:7, 0, :3].float()
        most = reference.largest(dtype)
        assert keys.tolist() == [[0, most, -most]] * 2, write


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


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    dims = 2 * draw(st.integers(16, 64))
    rotated = draw(st.integers(0, dims // 2))
    return Shape(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), dims, rotated, draw(st.booleans())
    )


@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    shape=shapes(),
    tokens=st.integers(0, 40),
    sink=st.integers(0, 3),
    rank=st.integers(1, 70),
    order=st.sampled_from(ORDERS),
)
def test_any_geometry(
    kernels: Kernels, shape: Shape, tokens: int, sink: int, rank: int, order: tuple[int, ...]
) -> None:
    if tokens:
        check_encode(kernels, encode_arguments(shape, tokens, torch.bfloat16, rank=rank))
    arguments = decode_arguments(shape, tokens, torch.bfloat16, order=order, sink=sink, rank=rank)
    check_decode(kernels, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [PLAIN, PARTIAL, INTERLEAVED, STILL])
def test_rotate(kernels: Kernels, shape: Shape, dtype: torch.dtype) -> None:
    filled = decode_arguments(shape, 60, torch.float32, pages=dtype, order=ORDERS[1], scale=0.5)
    reference.decode_paged(*filled)
    pages, slot_mapping, scales = filled[9], filled[11], filled[12][: shape.layers]
    turn = (
        [table[5].contiguous() for table in filled[4]],
        [table[5].contiguous() for table in filled[5]],
    )

    def arguments(pages: list[Tensor]) -> list[Any]:
        return [pages, slot_mapping, *turn, filled[6], scales]

    plain, found = ([page.clone() for page in pages] for _ in range(2))
    exact = [page.double() for page in pages]
    reference.rotate_paged(*arguments(plain))
    kernels["rotate_paged"](*arguments(found))
    reference.rotate_paged(*doubled(arguments(exact)))
    for layer in range(shape.layers):
        compare(plain[layer], found[layer], exact[layer], slot_mapping[layer])


def test_turning_back_gives_the_keys_back() -> None:
    filled = decode_arguments(INTERLEAVED, 40, torch.float32)
    reference.decode_paged(*filled)
    pages, slot_mapping, interleaved = filled[9], filled[11], filled[6]
    moved = [page.clone() for page in pages]
    cos, sin = ([table[9] for table in filled[part]] for part in (4, 5))
    for sign in (1, -1):
        rotated = [sign * table for table in sin]
        reference.rotate_paged(moved, slot_mapping, cos, rotated, interleaved, filled[12][:2])
    for page, back in zip(pages, moved, strict=True):
        torch.testing.assert_close(back, page)


@pytest.mark.skipif(DEVICE == "cuda", reason="torch chooses the kernels there")
def test_torch_operators_are_the_reference_on_a_cpu() -> None:
    arguments = encode_arguments(PLAIN, 5, torch.float32)
    assert torch.equal(ops.encode_states(*arguments), reference.encode_states(*arguments))
    torch.library.opcheck(ops.encode_states, tuple(arguments), test_utils=CHECKS)
    written = decode_arguments(PLAIN, 5, torch.float32)
    torch.library.opcheck(ops.decode_paged, tuple(written), test_utils=CHECKS)


def test_a_dtype_without_a_kernel_is_named(kernels: Kernels) -> None:
    arguments = encode_arguments(PLAIN, 3, torch.float32)
    arguments[0] = [key.double() for key in arguments[0]]
    with pytest.raises(TypeError, match=r"no kernel for torch\.float64"):
        kernels["encode_states"](*arguments)
