"""The kernels against the float64 reference: in the interpreter here, on a GPU under `gpu`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from awareness_kernels import ops, reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DEVICE,
    INTERLEAVED,
    ORDERS,
    PARTIAL,
    PLAIN,
    STILL,
    WIDE,
    Kernels,
    Shape,
    check_decode,
    check_encode,
    check_rotate,
    decode_arguments,
    encode_arguments,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.unit, pytest.mark.slow]

CHECKS = ("test_schema", "test_faketensor")


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


@pytest.mark.parametrize("shape", [PLAIN, PARTIAL])
def test_each_head_has_its_own_scale(kernels: Kernels, shape: Shape) -> None:
    arguments = decode_arguments(shape, 15, torch.bfloat16, pages=torch.float8_e4m3fn)
    heads = 2 * shape.layers * shape.heads
    arguments[12] = torch.linspace(0.25, 2, heads, device=DEVICE)
    check_decode(kernels, arguments)
    turn = [[table[5].contiguous() for table in arguments[part]] for part in (4, 5)]
    scales = arguments[12][: heads // 2]
    check_rotate(kernels, arguments[9], arguments[11], [*turn, arguments[6], scales])


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
    turn = [[table[5].contiguous() for table in filled[part]] for part in (4, 5)]
    check_rotate(kernels, filled[9], filled[11], [*turn, filled[6], filled[12][: shape.layers]])


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
