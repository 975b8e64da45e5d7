"""The connector: whatever goes wrong fails one request at most, and never reaches the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from connector_stubs import (
    blocks,
    connector,
    later,
    plain_request,
    plan_with,
    request,
    scheduled,
    step,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.v1.outputs import KVConnectorOutput

from awareness_vllm.serving.connector.metrics import StepOutcomes
from awareness_vllm.serving.connector.scheduler import ConnectorMetadata, LoadSpec, SaveSpec
from awareness_vllm.serving.connector.worker import Loaded

pytestmark = pytest.mark.unit


def loads_of(*names: str) -> ConnectorMetadata:
    loads = [LoadSpec(name, plan_with(), [0], 0, 1, ([1],)) for name in names]
    return ConnectorMetadata(loads=loads)


def loaded(load: LoadSpec) -> Loaded:
    if load.request_id == "bad":
        raise RuntimeError("out of memory, say")
    return Loaded("warm", 1, 1, 0.0)


def test_a_load_that_raises_fails_its_own_request_alone() -> None:
    made = connector(loaded)
    results = step(made, loads_of("good", "bad", "also good"))
    assert results.failed_recving == {"bad"}
    assert results.finished_recving == {"good", "bad", "also good"}
    assert step(made, ConnectorMetadata()) == KVConnectorTransferResults()


def test_an_aborted_requests_load_ends_once() -> None:
    """vLLM keeps the blocks of a request that is loading until it hears so, and dies of hearing it
    twice."""
    made = connector(loaded)
    assert step(made, loads_of("slow", "quick")).finished_recving == {"quick"}
    assert step(made, ConnectorMetadata(), "slow", "quick").finished_recving == {"slow"}
    assert step(made, ConnectorMetadata(), "slow") == KVConnectorTransferResults()


def test_a_failed_request_is_not_loaded_again() -> None:
    made = connector()
    bad, good = request(name="bad"), request(name="good")
    assert made.get_num_new_matched_tokens(bad, 0) == (20, True)
    made.update_state_after_alloc(bad, blocks([1, 2]), 20)
    made.update_connector_output(KVConnectorOutput(failed_recving={"bad", "aborted"}))
    assert made.scheduler.failed == {"bad"}
    made.update_connector_output(KVConnectorOutput())
    assert made.get_num_new_matched_tokens(bad, 0) == (0, False)
    assert made.get_num_new_matched_tokens(good, 0) == (20, True)
    made.request_finished_all_groups(bad, ([1],))
    assert made.scheduler.failed == set()
    assert list(made.scheduler.plans) == ["good"]


def test_a_load_that_cannot_be_planned_fails_its_request() -> None:
    made = connector(loaded)
    embeddings = request(name="embeddings")
    embeddings.prompt_token_ids = None
    made.update_state_after_alloc(embeddings, blocks([1, 2, 3]), 20)
    made.update_state_after_alloc(request(name="good"), blocks([1, 2, 3]), 20)
    metadata = made.build_connector_meta(later(1))
    assert [load.request_id for load in metadata.loads] == ["good"]
    results = step(made, metadata)
    assert results.failed_recving == {"embeddings"}
    assert results.finished_recving == {"embeddings", "good"}


def test_a_request_that_waits_for_no_load_hears_of_none() -> None:
    """It is running by then, and vLLM dies of hearing that its load has ended."""
    made = connector(loaded)
    unreadable: Any = SimpleNamespace(request_id="r")
    made.update_state_after_alloc(unreadable, blocks([1, 2]), 0)
    assert made.build_connector_meta(later(1, "r")) == ConnectorMetadata()
    made.update_state_after_alloc(unreadable, blocks([1, 2]), 20)
    assert made.build_connector_meta(later(1, "s")).failed == ["r"]


def test_a_step_is_idle_if_it_computes_nothing() -> None:
    """The worker cannot tell: Model Runner V2 calls it outside of any forward pass."""
    made = connector(loaded)
    for scheduler_output in (later(3, "r"), later(0), scheduled({}, step=1)):
        step(made, made.build_connector_meta(scheduler_output))
    assert made.worker.idle == [False, True, False]


def test_a_request_that_cannot_be_read_is_prefilled() -> None:
    made = connector()
    unreadable: Any = SimpleNamespace(request_id="r")
    assert made.get_num_new_matched_tokens(unreadable, 0) == (0, False)
    assert made.request_finished_all_groups(unreadable, ([1],)) == (False, None)
    assert made.tracker.outcomes == {}


def test_a_capture_that_raises_does_not_reach_the_engine() -> None:
    save = SaveSpec("/no/such/folder/f", 0, 1, 1, ([1],))
    assert step(connector(), ConnectorMetadata(saves=[save])) == KVConnectorTransferResults()


def test_plain_requests_pass_through() -> None:
    made, plain = connector(), plain_request()
    assert made.get_num_new_matched_tokens(plain, 0) == (0, False)
    made.update_state_after_alloc(plain, blocks([1]), 0)
    assert made.scheduler.take_step() == ConnectorMetadata()
    assert made.requires_kv_delivery is False


def test_outcomes_that_cannot_be_counted_do_not_reach_the_engine() -> None:
    made = connector()
    no_outcome: Any = {"r": object()}
    made.tracker.start("bad")
    output = KVConnectorOutput(
        failed_recving={"bad"},
        finished_recving={"r"},
        kv_connector_worker_meta=StepOutcomes(no_outcome),
    )
    made.update_connector_output(output)
    assert made.scheduler.failed == {"bad"}


def test_a_step_without_loads_sends_nothing() -> None:
    # Whatever is not None, vLLM sends through its processes in every step.
    made = connector()
    assert made.build_connector_worker_meta() is None
    assert made.get_kv_connector_stats() is None


def test_maps_are_warmed_up_with_the_kv_cache() -> None:
    """After it vLLM's own warm-up begins, with whose end compilations count as faults."""
    made, warmed = connector(), []
    made.worker.warm_up = lambda: warmed.append(True)
    made.register_kv_caches({})
    assert warmed == [True]
