"""From a load to its response: the report on a request's memory, and the statistics."""

from __future__ import annotations

import json
from typing import Any

import pytest
from connector_stubs import (
    blocks,
    connector,
    later,
    plain_request,
    plan_with,
    request,
    step,
)
from vllm.v1.outputs import KVConnectorOutput

from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.serving.connector.metrics import (
    RECOMPUTED,
    Failed,
    LoadStats,
    Outcome,
    StepOutcomes,
)
from awareness_vllm.serving.connector.scheduler import LoadSpec
from awareness_vllm.serving.connector.worker import Loaded
from awareness_vllm.serving.params import kv_transfer_params, passage_params

pytestmark = pytest.mark.unit

COLD = Loaded("cold", tokens=800, bytes=3 * 2**20, seconds=0.5)
WARM = Loaded("warm", tokens=800, bytes=3 * 2**20, seconds=0.02)
HOT = Loaded("hot", tokens=40, bytes=2**18, seconds=0.004)


def stats_of(*recorded: Outcome, requests: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    stats = LoadStats()
    for outcome in recorded:
        stats.record(outcome)
    stats.data["requests"].extend(requests)
    return stats.data


def prompt(name: str = "r", *, salt: str | None = None, computed: int = 60) -> Any:
    """A request with a prompt of 60 ids, 40 of them a memory's."""
    return request(60, memory=40, name=name, salt=salt, computed=computed)


def schedule(made: Any, one: Any, *, computed: int = 0) -> KVConnectorOutput:
    """The worker's output of one step with a new request, `computed` of whose tokens are in the
    prefix cache. As in vLLM, the scheduler's connector has not seen it yet."""
    external, asynchronous = made.get_num_new_matched_tokens(one, computed)
    assert asynchronous == (external > 0)
    made.update_state_after_alloc(one, blocks([1, 2, 3]), external)
    results = step(made, made.build_connector_meta(later(1)))
    return KVConnectorOutput(
        failed_recving=results.failed_recving,
        finished_recving=results.finished_recving,
        kv_connector_worker_meta=made.build_connector_worker_meta(),
    )


def finish(made: Any, one: Any) -> dict[str, Any] | None:
    """The report in a request's response when it ends. Nothing may be left of it."""
    waits, params = made.request_finished_all_groups(one, ([1, 2, 3],))
    assert waits is False
    assert made.tracker.outcomes == made.tracker.cached == {}
    assert made.scheduler.failed == set()
    assert made.scheduler.plans == {}
    assert params is None or list(params) == ["awareness"]
    return params and params["awareness"]


def stats(made: Any) -> dict[str, list[Any]]:
    """The statistics since the last call, as vLLM takes them."""
    taken = made.get_kv_connector_stats()
    return {} if taken is None else taken.to_dict()


@pytest.mark.parametrize("loaded", [COLD, WARM, HOT], ids=lambda loaded: loaded.temperature)
def test_a_response_says_how_its_memory_came(loaded: Loaded) -> None:
    made, one = connector(lambda load: loaded), prompt()
    made.update_connector_output(schedule(made, one))
    assert stats(made) == stats_of(loaded)
    report = {
        "temperature": loaded.temperature,
        "loaded_tokens": loaded.tokens,
        "seconds": loaded.seconds,
    }
    assert finish(made, one) == report
    json.dumps(report)
    assert stats(made) == stats_of(requests=(loaded.temperature,))
    assert made.get_kv_connector_stats() is None


def test_a_memory_that_was_all_in_the_prefix_cache_is_hot() -> None:
    made, one = connector(), prompt()
    made.update_connector_output(schedule(made, one, computed=48))
    assert stats(made) == {}
    assert finish(made, one) == {"temperature": "hot", "loaded_tokens": 0, "seconds": 0.0}
    assert stats(made)["requests"] == ["hot"]


def test_a_failed_load_is_reported_with_its_reason() -> None:
    def broken(load: LoadSpec) -> Loaded:
        raise PackageCorrupt("a secret path", found="a", expected="b")

    made, one = connector(broken), prompt()
    output = schedule(made, one)
    assert output.failed_recving == {"r"}
    made.update_connector_output(output)
    assert stats(made) == stats_of(Failed("PackageCorrupt"))
    assert schedule(made, one).kv_connector_worker_meta is None
    assert finish(made, one) == {"temperature": RECOMPUTED, "reason": "PackageCorrupt"}
    assert stats(made)["requests"] == [RECOMPUTED]


def test_a_failed_load_says_what_the_prefix_cache_had_of_the_memory() -> None:
    def broken(load: LoadSpec) -> Loaded:
        raise PackageCorrupt("gone")

    made, one = connector(broken), prompt()
    made.update_connector_output(schedule(made, one, computed=16))
    expected = {"temperature": RECOMPUTED, "reason": "PackageCorrupt", "cached_tokens": 16}
    assert finish(made, one) == expected


def test_a_load_that_cannot_be_planned_counts_once_as_failed() -> None:
    made, one = connector(), prompt()
    one.prompt_token_ids = None  # a prompt of embeddings
    made.update_connector_output(schedule(made, one))
    assert stats(made) == stats_of(Failed("AssertionError"))
    assert finish(made, one) == {"temperature": RECOMPUTED, "reason": "AssertionError"}


def test_a_request_that_cannot_be_read_counts_once_however_often_it_is_tried() -> None:
    made, one = connector(), prompt()
    del one.num_tokens
    for _ in range(3):
        assert made.get_num_new_matched_tokens(one, 0) == (0, False)
    assert stats(made) == stats_of(Failed("AttributeError"))
    assert finish(made, one) == {"temperature": RECOMPUTED, "reason": "AttributeError"}


def test_a_preempted_request_reports_its_last_load() -> None:
    outcomes = iter([COLD, HOT])
    made, one = connector(lambda load: next(outcomes)), prompt()
    made.update_connector_output(schedule(made, one))
    made.update_connector_output(schedule(made, one, computed=16))
    assert stats(made) == stats_of(COLD, HOT)
    # Preempted once more: this time the prefix cache has it all.
    made.update_connector_output(schedule(made, one, computed=48))
    report = finish(made, one)
    assert report is not None
    assert report["temperature"] == "hot"
    assert report["loaded_tokens"] == HOT.tokens


def test_nothing_is_kept_of_a_request_that_is_aborted_while_it_loads() -> None:
    made, one = connector(lambda load: COLD), prompt()
    output = schedule(made, one)
    assert finish(made, one) is None
    made.update_connector_output(output)
    assert made.tracker.outcomes == {}
    assert stats(made) == stats_of(COLD)


def test_a_request_that_was_never_scheduled_is_not_hot() -> None:
    made = connector()
    assert finish(made, prompt(computed=0)) is None
    assert stats(made) == {}


def test_requests_without_a_memory_get_no_report() -> None:
    made, plain = connector(), plain_request()
    for one in (plain, prompt(salt="forged", name="forged")):
        made.update_connector_output(schedule(made, one))
        assert finish(made, one) is None
    assert stats(made) == {}


@pytest.mark.parametrize("aborted", [False, True])
def test_a_passages_request_reports_its_load_and_counts_nowhere(aborted: bool) -> None:
    made, one = connector(lambda load: WARM), request(30)
    plan = passage_params(plan_with(tokens=40).parts[0], (20, 30), "")
    one.kv_transfer_params, one.cache_salt = kv_transfer_params(plan), plan.cache_salt
    output = schedule(made, one)
    if aborted:
        assert finish(made, one) is None
    made.update_connector_output(output)
    if not aborted:
        report = finish(made, one)
        assert report is not None
        assert report["temperature"] == "warm"
    assert stats(made) == {}
    assert made.tracker.uncounted == set()


def test_requests_are_told_apart() -> None:
    by_name = {"a": COLD, "b": WARM}
    made = connector(lambda load: by_name[load.request_id])
    requests = [prompt(name) for name in by_name]
    for output in [schedule(made, one) for one in requests]:
        made.update_connector_output(output)
    for one in requests:
        report = made.request_finished(one, [])[1]
        assert report["awareness"]["temperature"] == by_name[one.request_id].temperature


def test_outcomes_are_handed_over_once() -> None:
    made = connector(lambda load: COLD)
    assert schedule(made, prompt()).kv_connector_worker_meta == StepOutcomes({"r": COLD})
    assert made.build_connector_worker_meta() is None
