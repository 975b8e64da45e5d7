"""The worker half on a device: only idle it waits for chunks; a load without room on the device
fails alone."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connector_stubs import MEMORY, plan_with
from paged_stubs import embed, paged_map
from worker_stubs import NOWHERE, made_worker

from awareness_vllm.align.encoding import LatentEncoding
from awareness_vllm.align.paged import Latent
from awareness_vllm.errors import OutOfDeviceMemory
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.store import digest_in
from awareness_vllm.serving.connector import worker as worker_module
from awareness_vllm.serving.connector.scheduler import LoadSpec
from awareness_vllm.serving.connector.worker import ConnectorWorker
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.fixture
def worker(geometry: Geometry) -> ConnectorWorker:
    return made_worker(geometry)


def load_of(request: str, memory: str) -> LoadSpec:
    return LoadSpec(request, plan_with(memory, tokens=12), list(range(12)), 0, 12, ([0], NOWHERE))


def test_an_idle_engine_waits_for_a_chunk(
    worker: ConnectorWorker, wmatrix: WMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, source = wmatrix.manifest.source.layers, torch.arange(4)
    states = [torch.zeros(4, layer.heads, layer.head_dim) for layer in layers]
    work = LatentEncoding(paged_map(wmatrix), states, states, [0] * 6, source, embed)
    work.running = [Future()]
    monkeypatch.setattr(worker.loader, "read", lambda *args: Future())
    worker.begin(load_of("r", "m"))
    worker.pending["r"].alignments[0].work = work
    waited: list[Any] = []
    monkeypatch.setattr(worker_module, "wait", lambda futures, *args: waited.extend(futures))
    worker.ready()
    assert waited == []
    worker.ready(idle=True)
    assert waited == work.running


def test_a_write_that_the_device_has_no_room_for_fails_alone_and_is_not_tried_again(
    worker: ConnectorWorker,
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    worker.layout = replace(worker.layout, layers={})  # their pages are a CPU's
    worker.loader.paged[""] = SimpleNamespace(write=full)  # type: ignore[assignment]
    latent = Latent(list(range(12)), torch.zeros(12, 1))
    worker.loader.warm.put((digest_in("mem"), ""), latent)
    worker.begin(load_of("r", "mem"))
    worker.begin(load_of("s", MEMORY))
    assert worker.ready() == ["r", "s"]
    with pytest.raises(OutOfDeviceMemory):
        worker.finish("r")
    assert worker.finish("s").temperature == "warm"
    worker.begin(load_of("t", "mem"))
    assert worker.ready() == ["t"]
    with pytest.raises(OutOfDeviceMemory):
        worker.finish("t")
