"""The front end's calls to the workers: by their signature, or not at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from awareness_vllm.errors import Unauthorized
from awareness_vllm.serving.connector import worker_extension as module
from awareness_vllm.serving.connector.worker_extension import (
    CALL,
    EVICT,
    FORGET,
    AwarenessWorkerExtension,
    WorkerCalls,
    signed,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> AwarenessWorkerExtension:
    """Of a worker that says what it was asked to drop."""
    loader = SimpleNamespace(evict=lambda memory, tenant: [memory, tenant])
    group: Any = SimpleNamespace(worker=SimpleNamespace(loader=loader))
    monkeypatch.setattr("vllm.distributed.kv_transfer.get_kv_transfer_group", lambda: group)
    extension = AwarenessWorkerExtension()
    extension.model_runner = None
    return extension


def test_a_signed_call_is_answered(extension: AwarenessWorkerExtension) -> None:
    assert extension.awareness_call(*signed(EVICT, "mem", "acme")) == ["mem", "acme"]


@pytest.mark.parametrize(
    "signature",
    ["", "0" * 64, "é", None, 7, pytest.param(signed(EVICT, "mem", "x")[2], id="another call's")],
)
def test_a_call_of_anybody_else_is_refused(
    extension: AwarenessWorkerExtension, signature: Any
) -> None:
    with pytest.raises(Unauthorized):
        extension.awareness_call(EVICT, ["mem", "acme"], signature)
    with pytest.raises(Unauthorized):
        extension.awareness_call(FORGET, ["mem", "acme"], signed(EVICT, "mem", "acme")[2])


def test_a_worker_offers_nothing_else_by_rpc() -> None:
    """vLLM's development mode lets everybody call any method of a worker by its name."""
    assert [name for name in dir(AwarenessWorkerExtension) if not name.startswith("__")] == [CALL]
    names = {value for name, value in vars(module).items() if name.isupper()}
    offered = {name for name in vars(WorkerCalls) if name[0] != "_"}
    assert names - {CALL, TYPE_CHECKING} == offered
