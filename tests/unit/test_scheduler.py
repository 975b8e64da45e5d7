"""The scheduler half: which tokens are loaded, into which blocks, and what is captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from connector_stubs import blocks, later, plain_request, plan_with, request, scheduled
from hypothesis import given
from hypothesis import strategies as st

from awareness_vllm.serving.connector import scheduler as scheduler_module
from awareness_vllm.serving.connector.kv_layout import NULL_BLOCK
from awareness_vllm.serving.connector.scheduler import (
    MIN_COMPUTED,
    ConnectorMetadata,
    ConnectorScheduler,
    SaveSpec,
)
from awareness_vllm.serving.params import LoadParams, kv_transfer_params, passage_params

pytestmark = pytest.mark.unit

KEY = "key"


def scheduler(*windows: int | None) -> ConnectorScheduler:
    return ConnectorScheduler(windows or (None,))


# Loads


@given(
    tokens=st.integers(1, 60),
    memory=st.integers(1, 60),
    tail=st.integers(0, 20),
    computed=st.integers(0, 60),
)
def test_tokens_to_load(tokens: int, memory: int, tail: int, computed: int) -> None:
    half, one = scheduler(), request(tokens, memory=memory, tail=tail)
    count = half.tokens_to_load(one, computed)
    assert count == half.tokens_to_load(one, computed)
    assert count >= 0
    if count:
        assert computed + count == min(memory - tail, tokens - MIN_COMPUTED)
    else:
        assert computed >= min(memory - tail, tokens - MIN_COMPUTED)
    assert half.take_step() == ConnectorMetadata()


def test_other_requests_load_nothing() -> None:
    half = scheduler()
    assert half.tokens_to_load(request(salt="forged", name="forged"), 0) == 0
    plain = plain_request()
    assert half.tokens_to_load(plain, 0) == 0
    half.plan_load(plain, blocks([1, 2, 3]), 0)
    assert half.take_step() == ConnectorMetadata()


def test_the_memorys_last_tokens_go_into_the_requests_blocks() -> None:
    half = scheduler(None, 8)
    one = request(60, memory=45, tail=5)
    assert half.tokens_to_load(one, 16) == 24
    ids = ([7, 8, 9], [NULL_BLOCK, NULL_BLOCK, NULL_BLOCK, NULL_BLOCK, 6])
    half.plan_load(one, blocks(*ids), 24)
    (load,) = half.take_step().loads
    assert (load.request_id, load.begin, load.end) == ("r", 16, 40)
    assert load.ids == list(range(45))
    assert load.block_ids == ids
    assert half.take_step() == ConnectorMetadata()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The parameters that were parsed, one after another."""
    calls: list[object] = []
    parse = LoadParams.of

    def of(params: object, salt: str | None) -> LoadParams | None:
        calls.append(params)
        return parse(params, salt)

    monkeypatch.setattr(scheduler_module, "LoadParams", SimpleNamespace(of=of))
    return calls


@pytest.mark.parametrize("salt", [None, "forged"])
def test_a_requests_plan_is_parsed_once_and_anew_after_its_end(
    parsed: list[object], salt: str | None
) -> None:
    half, one = scheduler(), request(salt=salt)
    for _ in range(3):
        half.tokens_to_load(one, 0)
        half.plan_load(one, blocks([1, 2]), 20)
        half.plan_of(one)
    assert len(parsed) == 1
    half.finish("r")
    assert half.plans == {}
    # The ID of an aborted request may come back with other memories.
    assert half.tokens_to_load(request(memory=10), 0) == 10
    assert len(parsed) == 2


def test_no_more_plans_are_kept_than_that(
    parsed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "MAX_PLANS", 2)
    half = scheduler()
    for name in ("a", "b", "c", "c", "a"):
        assert half.tokens_to_load(request(name=name), 0) == 20
        assert len(half.plans) <= 2
    assert len(parsed) == 4


# Captures


def test_a_capture_is_read_back_when_its_whole_prompt_is_computed() -> None:
    half = scheduler()
    for output in (scheduled(None), scheduled({"other": 1}), scheduled({KEY: 7})):
        half.plan_saves(output, KEY)
        assert half.take_step() == ConnectorMetadata()
    half.plan_saves(scheduled({KEY: "p"}), KEY)
    assert half.take_step().saves == [SaveSpec("p", 0, 5, 5, ([2, 3],))]


def test_a_capture_is_read_in_the_steps_of_its_prompt() -> None:
    half = scheduler()
    half.plan_saves(scheduled({KEY: "p"}, step=4, ids=([2],)), KEY)
    half.plan_saves(later(1, "another"), KEY)
    assert half.take_step().saves == [SaveSpec("p", 0, 4, 5, ([2],))]
    half.plan_saves(later(1, "r", ids=([9],), computed=4), KEY)
    assert half.take_step().saves == [SaveSpec("p", 4, 5, 5, ([2, 9],))]
    half.plan_saves(later(1, "r", ids=([5],), computed=5), KEY)
    assert half.take_step() == ConnectorMetadata()


def test_a_preempted_capture_starts_its_blocks_anew() -> None:
    half = scheduler()
    half.plan_saves(scheduled({KEY: "p"}, step=4, ids=([2],)), KEY)
    half.take_step()
    half.plan_saves(later(5, "r", ids=([6, 7],), resumed=("r",)), KEY)
    assert half.take_step().saves == [SaveSpec("p", 0, 5, 5, ([6, 7],))]


def test_a_capture_with_a_beginning_leaves_out_what_comes_before() -> None:
    half = scheduler()
    asked = {KEY: {"name": "p", "begin": 3}}
    half.plan_saves(scheduled(asked, step=2), KEY)
    assert half.take_step() == ConnectorMetadata()
    half.plan_saves(later(2, "r", computed=2), KEY)
    half.plan_saves(later(1, "r", computed=4), KEY)
    assert [(save.begin, save.end) for save in half.take_step().saves] == [(3, 4), (4, 5)]
    half.plan_saves(scheduled(asked, step=4), KEY)
    half.plan_saves(later(5, "r", ids=([6, 7],), resumed=("r",)), KEY)
    assert half.take_step().saves[-1] == SaveSpec("p", 3, 5, 5, ([6, 7],))


@pytest.mark.parametrize("asked", [7, {"name": 7}, {"begin": 3}, {"name": "p", "begin": -1}])
def test_what_names_no_capture_captures_nothing(asked: object) -> None:
    half = scheduler()
    half.plan_saves(scheduled({KEY: asked}), KEY)
    assert half.take_step() == ConnectorMetadata()


def test_of_a_passage_a_layer_holds_the_window_before_it() -> None:
    half = scheduler(None, 3)
    output: Any = scheduled(
        {KEY: {"name": "p", "begin": 4}}, computed=4, step=1, ids=([2, 3], [4, 5])
    )
    half.plan_saves(output, KEY)
    (save,) = half.take_step().saves
    assert (save.begin, save.block_ids) == (4, ([2, 3], [4, 5]))


def test_a_finished_request_is_captured_no_more() -> None:
    half = scheduler()
    half.plan_saves(scheduled({KEY: "p"}, step=4, ids=([2],)), KEY)
    half.finish("r")
    half.take_step()
    half.plan_saves(later(1, "r", ids=([9],), computed=4), KEY)
    assert half.take_step() == ConnectorMetadata()


@pytest.mark.parametrize(
    ("computed", "window_blocks"), [(0, [4, 5]), (2, [4, 5]), (4, [NULL_BLOCK] * 2)]
)
def test_of_a_cached_prompt_a_layer_holds_its_window(
    computed: int, window_blocks: list[int]
) -> None:
    half = scheduler(None, 3)
    output: Any = scheduled({KEY: "p"}, computed=computed, step=5 - computed, ids=([2, 3], [4, 5]))
    half.plan_saves(output, KEY)
    (save,) = half.take_step().saves
    assert (save.begin, save.block_ids) == (0, ([2, 3], window_blocks))


def test_a_window_does_not_lose_what_an_earlier_step_has_read() -> None:
    half = scheduler(None, 3)
    half.plan_saves(scheduled({KEY: "p"}, step=4, ids=([2], [4])), KEY)
    half.plan_saves(later(1, "r", ids=([3], [5]), computed=4), KEY)
    assert [save.block_ids for save in half.take_step().saves] == [
        ([2], [4]),
        ([2, 3], [4, 5]),
    ]


# Passages


def passage_request(half: ConnectorScheduler, *, begin: int = 20, end: int = 30) -> Any:
    """The server's own request for a passage, as the scheduler half has seen it."""
    one = request(end)
    plan = passage_params(plan_with(tokens=40).parts[0], (begin, end), "")
    one.kv_transfer_params, one.cache_salt = kv_transfer_params(plan), plan.cache_salt
    assert half.tokens_to_load(one, 0) == begin
    return one


def test_a_passage_is_read_back_after_the_aligned_states_before_it() -> None:
    half = scheduler(None, 8)
    plan = half.plan_of(passage_request(half))
    assert plan is not None
    half.plan_saves(scheduled(None, computed=20, step=6, tokens=30, ids=([1, 2], [3, 4])), KEY)
    half.plan_saves(later(4, "r", ids=([], []), computed=26), KEY)
    blocks_ = ([1, 2], [3, 4])
    assert half.take_step().saves == [
        SaveSpec("r", 20, 26, 30, blocks_, plan.passage_name),
        SaveSpec("r", 26, 30, 30, blocks_, plan.passage_name),
    ]


@pytest.mark.parametrize("computed", [0, 16])
def test_a_passage_whose_load_has_failed_is_not_kept(computed: int) -> None:
    half = scheduler()
    passage_request(half)
    half.plan_saves(scheduled(None, computed=computed, step=30 - computed, tokens=30), KEY)
    assert half.take_step() == ConnectorMetadata()
    assert half.captures == {}


def test_a_passage_is_read_back_again_after_a_preemption() -> None:
    half = scheduler()
    passage_request(half)
    half.plan_saves(scheduled(None, computed=20, step=6, tokens=30), KEY)
    half.take_step()
    half.plan_saves(later(10, "r", ids=([6, 7],), computed=20, resumed=("r",)), KEY)
    (save,) = half.take_step().saves
    assert (save.begin, save.end, save.block_ids) == (20, 30, ([6, 7],))
