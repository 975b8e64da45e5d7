"""The decode kernel's scatter against vLLM's own: the same bytes of the same paged cache."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.engine

BLOCKS, HEADS, SIZE, DIMS = 6, 2, 32, 64


@pytest.mark.parametrize("rows", [1, 15, 63, 129])
def test_the_scatter_writes_what_vllm_writes(rows: int) -> None:
    from awareness_kernels.decode import decode_paged
    from vllm import _custom_ops as vllm_ops

    torch.manual_seed(rows)
    caches = [torch.full((BLOCKS, HEADS, SIZE, 2 * DIMS), 7.0).bfloat16() for _ in range(2)]
    key, value = (torch.randn(rows, HEADS, DIMS).bfloat16() for _ in range(2))
    slot_mapping = torch.randperm(BLOCKS * SIZE)[:rows]
    slot_mapping[1::4] = -1
    halves = caches[0].view(BLOCKS, HEADS, 2 * SIZE, DIMS).chunk(2, dim=2)
    vllm_ops.cpu_attn_reshape_and_cache(key, value, *halves, slot_mapping, "vec")
    # With this instruction set vLLM keeps keys transposed within a head, values token by token.
    parts = caches[1].view(BLOCKS, HEADS, 2, SIZE * DIMS)
    keys = parts[:, :, 0].unflatten(-1, (DIMS, SIZE)).permute(0, 3, 1, 2)
    values = parts[:, :, 1].unflatten(-1, (SIZE, DIMS)).permute(0, 2, 1, 3)
    width = HEADS * DIMS
    nothing = torch.empty(rows, 0)
    decode_paged(
        torch.empty(0, 4).bfloat16(),
        torch.zeros(4, 2 * width).bfloat16(),
        torch.zeros(2 * width),
        torch.arange(rows),
        [nothing],
        [nothing],
        [0],
        [key],
        [value],
        [keys],
        [values],
        [slot_mapping],
        torch.ones(2),
    )
    assert torch.equal(*caches)
    assert (caches[0] != 7).any()
