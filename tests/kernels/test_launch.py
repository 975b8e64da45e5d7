"""The launchers: blocks of rows, indices that lead nowhere, and what the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from awareness_kernels import blocks, decode, encode, launch, ops, rotate
from kernel_cases import (
    DEVICE,
    PARTIAL,
    PLAIN,
    Kernels,
    check_decode,
    check_encode,
    decode_arguments,
    each,
    encode_arguments,
)
from torch import Tensor

# Triton's interpreter is slow: `make unit` leaves it to `make test`.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.unit, pytest.mark.slow]


@pytest.mark.parametrize(("tokens", "sink"), [(37, 2), (16, 17), (32, 0)])
def test_blocks_of_rows_are_one_memory(
    kernels: Kernels, tokens: int, sink: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "MOST_ROWS", 16)
    check_encode(kernels, encode_arguments(PARTIAL, tokens, torch.bfloat16, predecessors=3))
    check_decode(kernels, decode_arguments(PARTIAL, tokens, torch.bfloat16, sink=sink))


@pytest.mark.parametrize("width", [704, 49_152, 65_536, 114_688, 163_840])
def test_a_block_is_as_large_as_its_bound_allows(width: int) -> None:
    """Widths of the demo's pair and of 8B and 70B models."""
    rows = blocks.block_rows(width, 2)
    assert 2 * rows * width <= blocks.SCRATCH
    assert rows == blocks.MOST_ROWS or 4 * rows * width > blocks.SCRATCH


WILD = (-1, 10**6, 2**40, -(2**62), 2**62)
"""Indices that lead nowhere; those on a device are checked by nobody else."""


def test_a_row_that_reads_nothing_says_nothing(kernels: Kernels) -> None:
    arguments = encode_arguments(PLAIN, 15, torch.bfloat16, predecessors=0)
    expected = kernels["encode_states"](*masked_from(arguments, 10))
    arguments[5][10:] = torch.tensor(WILD, device=DEVICE)
    assert torch.equal(kernels["encode_states"](*arguments), expected)
    arguments[8] = torch.cat((arguments[8], torch.zeros_like(arguments[8][:1])))
    arguments[7][12:] = len(arguments[8]) - 1
    expected = kernels["encode_states"](*arguments)
    arguments[7][12:] = torch.tensor(WILD, device=DEVICE)
    assert torch.equal(kernels["encode_states"](*arguments), expected)


def masked_from(arguments: list[Any], begin: int) -> list[Any]:
    masked = arguments[6].clone()
    masked[begin:] = True
    return [*arguments[:6], masked, *arguments[7:]]


@pytest.mark.parametrize("part", [3, 11])
def test_a_row_that_leads_nowhere_is_not_written(kernels: Kernels, part: int) -> None:
    """By its position (3) or by its slot (11)."""
    runs = [decode_arguments(PLAIN, 15, torch.bfloat16) for _ in range(2)]
    for slot in runs[0][11]:
        slot[-5:] = -1
    for index in [runs[1][3]] if part == 3 else runs[1][11]:
        index[-5:] = torch.tensor(WILD, device=DEVICE)
    for arguments in runs:
        kernels["decode_paged"](*arguments)
    for a, b in zip((*runs[0][9], *runs[0][10]), (*runs[1][9], *runs[1][10]), strict=True):
        assert torch.equal(a, b)
    if part == 11:
        turn = [[table[5].contiguous() for table in runs[0][at]] for at in (4, 5)]
        for arguments in runs:
            scales = arguments[12][: PLAIN.layers]
            kernels["rotate_paged"](arguments[9], arguments[11], *turn, arguments[6], scales)
        for a, b in zip(runs[0][9], runs[1][9], strict=True):
            assert torch.equal(a, b)


def test_the_slots_of_a_group_go_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(launch, "upload", lambda x, device: sent.append(x) or x)
    groups = [torch.arange(5), torch.arange(5)]
    layers = [groups[i % 2] for i in range(6)]
    found = launch.upload_slots(layers, torch.device(DEVICE))
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in layers]
    assert [x.data_ptr() for x in sent] == [x.data_ptr() for x in groups]


class Recorder:
    """A kernel that is launched and does nothing."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.launches += 1

        return launch


def test_a_launcher_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor on "meta" has no numbers: whoever asked for one would raise."""
    recorder = Recorder()
    for module, name in (
        (encode, "pack_states_kernel"),
        (encode, "pack_embeddings_kernel"),
        (decode, "scatter_kernel"),
        (rotate, "rotate_kernel"),
    ):
        monkeypatch.setattr(module, name, recorder)
    decoded = decode_arguments(PLAIN, 63, torch.bfloat16)
    turn = [[table[5].contiguous() for table in decoded[part]] for part in (4, 5)]
    rotated = [decoded[9], decoded[11], *turn, decoded[6], decoded[12][: PLAIN.layers]]
    calls = (
        (encode.encode_states, encode_arguments(PLAIN, 63, torch.bfloat16), (5, 6, 7)),
        (decode.decode_paged, decoded, (3, 11)),
        (rotate.rotate_paged, rotated, (1,)),
    )
    for launch_, arguments, indices in calls:
        launch_(
            *(
                each([x], Tensor.cpu if i in indices else lambda y: y.to("meta"))[0]
                for i, x in enumerate(arguments)
            )
        )
    assert recorder.launches == 4


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU has nothing to wait for")
def test_the_host_waits_for_nothing() -> None:
    """With indices on the host and on the device; each kernel was compiled by the first call."""
    encoded = encode_arguments(PLAIN, 63, torch.bfloat16)
    decoded = decode_arguments(PLAIN, 63, torch.bfloat16)
    turn = [[table[5].contiguous() for table in decoded[part]] for part in (4, 5)]
    rotated = [decoded[9], decoded[11], *turn, decoded[6], decoded[12][: PLAIN.layers]]
    hosts = [[*encoded], [*decoded], [*rotated]]
    for arguments, parts in zip(hosts, ((5, 6, 7), (3, 11), (1,)), strict=True):
        for part in parts:
            arguments[part] = each([arguments[part]], Tensor.cpu)[0]
    for run in range(2):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if run else "default")
        try:
            for arguments in (hosts, [encoded, decoded, rotated]):
                ops.encode_states(*arguments[0])
                ops.decode_paged(*arguments[1])
                ops.rotate_paged(*arguments[2])
        finally:
            torch.cuda.set_sync_debug_mode("default")
