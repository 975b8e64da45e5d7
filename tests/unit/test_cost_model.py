"""The kernels' cost model, which stands where no GPU measures, and the cold load's chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cold_load
import pytest
import torch
from awareness_kernels import ops
from kernel_benchmark import cases, device, predicted, shapes
from torch import Tensor

pytestmark = pytest.mark.unit

H100 = predicted.CARDS[predicted.ASSUMED]
SMALL = shapes.Pair(shapes.Side(3, 2, 16), shapes.Side(2, 1, 32, 24), 8, 2)
BARS = {"encode_states": 0.8, "decode_paged": 0.8, "rotate_paged": 0.9}


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random arguments on the host, whatever this machine has."""
    monkeypatch.setattr(device, "CUDA", False)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    torch.manual_seed(0)


@pytest.mark.parametrize("card", ["A100 80 GB", "H100 SXM", "H200", "B200"])
@pytest.mark.parametrize("operation", ["encode_states", "decode_paged"])
@pytest.mark.parametrize("pair", shapes.LARGE)
def test_pack_and_scatter_leave_the_product_most_of_the_time(
    pair: str, operation: str, card: str
) -> None:
    found = predicted.predict(shapes.PAIRS[pair], 4096, operation, predicted.CARDS[card])
    assert found["of_floor"] >= BARS[operation]
    assert found["product_ms"] > found["copy_ms"]


@pytest.mark.parametrize("product", [0.6, 0.8])
@pytest.mark.parametrize("copy", [0.85, 0.93])
@pytest.mark.parametrize("elementwise", [0.8, 0.95])
@pytest.mark.parametrize("operation", BARS)
def test_the_prediction_does_not_hang_on_one_assumption(
    operation: str, elementwise: float, copy: float, product: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predicted, "ELEMENTWISE_SHARE", elementwise)
    peaks = replace(H100, product=989e12 * product, copy=3.35e12 * copy)
    for pair in shapes.LARGE.values():
        found = predicted.predict(pair, 4096, operation, peaks)
        assert found["of_floor"] >= BARS[operation]


@pytest.mark.parametrize("operation", BARS)
def test_what_costs_more_takes_longer(operation: str) -> None:
    pair = shapes.LARGE["8B → 8B"]

    def ms(peaks: predicted.Peaks, tokens: int = 4096) -> float:
        return predicted.predict(pair, tokens, operation, peaks)["ms"]

    assert ms(H100) < 1.1 * ms(H100, 8192) / 2
    assert ms(H100) > ms(replace(H100, copy=2 * H100.copy))
    assert ms(H100) < ms(replace(H100, clock=H100.clock / 8))
    if operation != "rotate_paged":
        assert ms(H100) > ms(replace(H100, product=2 * H100.product))


def test_bytes_are_those_of_the_arguments(cpu: None) -> None:
    """Each tensor once, however many layers share it; of pages, what is in slots."""
    tokens = 21
    for case in cases.cases(SMALL, tokens):
        paged = cases.PAGES[case.operation]
        flat: list[Tensor] = []
        for i, part in enumerate(case.arguments):
            flat += [] if i in paged else part if isinstance(part, list) else [part]
        inputs = {x.data_ptr(): x.nbytes for x in flat if isinstance(x, Tensor)}
        written = [page[0, 0].nbytes for i in paged for page in case.arguments[i]]
        moved = sum(inputs.values()) + (tokens + 1) * sum(written)
        if case.operation == "rotate_paged":
            moved += (tokens + 1) * sum(written)
        if case.operation == "encode_states":
            moved += ops.encode_states(*case.arguments).nbytes
        assert shapes.bytes_moved(SMALL, tokens, case.operation) == moved


@pytest.mark.parametrize("tokens", [7, 32, 50])
def test_a_load_in_chunks_writes_what_one_call_writes(
    tokens: int, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_load, "CHUNK", 16)
    load = cold_load.Load.of(SMALL, tokens)
    half = len(load.states) // 2
    whole: list[Any] = [load.states[:half], load.states[half:], *load.encode[2:]]
    pages = [[page.clone() for page in load.decode[i]] for i in (9, 10)]
    latent = ops.encode_states(*whole)
    ops.decode_paged(latent, *load.decode[1:9], *pages, *load.decode[11:])
    load.run()
    for one, other in zip(pages, load.decode[9:11], strict=True):
        assert any(page.any() for page in one)
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(b, a)


def test_a_cold_load_is_predicted_within_twice_the_bytes_time() -> None:
    for pair in shapes.LARGE.values():
        assert 1 < cold_load.predicted(pair, 8192)["of_pcie"] <= cold_load.BAR
