"""Requests on their way to vLLM's handlers, and the served model as reports see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import numpy as np
import pytest
from starlette.responses import JSONResponse, Response, StreamingResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.utils.api_utils import load_aware_call

from awareness_vllm.errors import AwarenessError, UnsupportedRequest
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Tokens
from awareness_vllm.serving.admission import Admission, Admitted
from awareness_vllm.serving.api.capture import Capture
from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.front_end import target_config
from awareness_vllm.serving.api.report import add_report
from awareness_vllm.serving.api.routes import answer, attach_params, check_previous
from awareness_vllm.serving.api.validation import strip_reserved_params
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.metrics import RECOMPUTED
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.tenants import Tenants

pytestmark = pytest.mark.unit

PROMPT = Prompt((ResolvedMemory("mem_a", "a", "own", None, [2, 5, 6], 1),), tail=0, tenant="acme")


@pytest.mark.parametrize(("cache_dtype", "expected"), [("fp8", "fp8"), ("turboquant", "auto")])
def test_reports_see_the_window_of_the_served_model(
    geometry: Geometry, cache_dtype: str, expected: str
) -> None:
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype="torch.float16", max_model_len=7),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype, block_size=128),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    model = ServedModel(Path("none"), 4096, geometry)
    config = target_config(vllm_config, model, tail=5)
    assert config.context_length == model.max_model_len == 4096
    assert (config.quantization, config.kv_cache_dtype) == ("fp16", expected)
    assert (config.block_size, config.num_gpus, config.tail) == (128, 2, 5)


def test_a_client_cannot_set_reserved_params() -> None:
    params = {PARAMS_KEY: {"parts": []}, CAPTURE_KEY: "name", "other": 1}
    request = CompletionRequest(prompt="hi", kv_transfer_params=params)
    strip_reserved_params(request)
    assert request.kv_transfer_params == {"other": 1}
    request.kv_transfer_params = {PARAMS_KEY: {}}
    strip_reserved_params(request)
    assert request.kv_transfer_params is None


def test_a_request_carries_its_load_plan_and_salt() -> None:
    request = CompletionRequest(prompt="hi", cache_salt="mine", kv_transfer_params={"other": 1})
    assert attach_params(request, PROMPT)["other"] == 1
    assert LoadParams.of(request.kv_transfer_params, request.cache_salt) == PROMPT.params
    natively = CompletionRequest(prompt="hi", cache_salt="mine")
    attach_params(natively, PROMPT.recomputed())
    assert (natively.cache_salt, natively.kv_transfer_params) == ("mine", {})


def reported(body: dict[str, Any], prompt: Prompt = PROMPT) -> JSONResponse:
    response = JSONResponse(body, headers={"X-Other": "kept"})
    add_report(response, prompt)
    return response


def plainly_reported(body: dict[str, Any]) -> Response:
    """The same of what vLLM answers from 0.33 on."""
    content, headers = json.dumps(body).encode(), {"X-Other": "kept"}
    response = Response(content, headers=headers, media_type="application/json")
    add_report(response, PROMPT)
    return response


@pytest.mark.parametrize("reported", [reported, plainly_reported])
def test_a_response_reports_its_memories(reported: Callable[[Any], Response]) -> None:
    load = {"temperature": "warm", "loaded_tokens": 2, "seconds": 0.1}
    body = {"text": "t", "kv_transfer_params": {PARAMS_KEY: load, "other": 1}}
    response = reported(body)
    report = json.loads(bytes(response.body))
    assert report["memory"] == {**PROMPT.report(), **load}
    assert report["kv_transfer_params"] == {"other": 1}
    assert response.headers["X-Awareness-Memories"] == "mem_a"
    assert response.headers["X-Awareness-Plan"] == "load"
    assert response.headers["X-Awareness-Tokens"] == "2"
    assert response.headers["X-Awareness-Retention"] == "1.000"
    assert response.headers["X-Other"] == "kept"
    assert int(response.headers["Content-Length"]) == len(response.body)


@pytest.mark.parametrize(
    ("load", "retention"),
    [
        ({"temperature": "cold"}, None),
        ({"temperature": RECOMPUTED, "reason": "PackageCorrupt"}, 1.0),
        # Its first tokens are the aligned ones of an earlier request.
        ({"temperature": RECOMPUTED, "reason": "PackageCorrupt", "cached_tokens": 16}, None),
    ],
)
def test_what_the_model_read_itself_is_kept_whole(
    load: dict[str, Any], retention: float | None
) -> None:
    response = reported({"kv_transfer_params": {PARAMS_KEY: load}}, PROMPT.with_head([9]))
    assert json.loads(bytes(response.body))["memory"]["retention"] == [retention]
    assert ("X-Awareness-Retention" in response.headers) == (retention is not None)


def test_a_response_says_why_its_memories_were_not_loaded() -> None:
    response = reported({}, PROMPT.recomputed("the head is\ntoo long…"))
    assert json.loads(bytes(response.body))["memory"]["reason"] == "the head is\ntoo long…"
    assert response.headers["X-Awareness-Reason"] == "the head is too long?"
    assert response.headers["X-Awareness-Plan"] == "recompute"


def test_scripts_of_a_web_page_may_read_all_our_headers() -> None:
    stream = StreamingResponse(iter(()), headers={"Access-Control-Expose-Headers": "X-Other"})
    add_report(stream, PROMPT)
    exposed = stream.headers["Access-Control-Expose-Headers"].split(", ")
    ours = {name for name in stream.headers if name.startswith("x-awareness")}
    assert len(ours) == 5
    assert ours | {"x-other"} == {name.lower() for name in exposed}


# vLLM's gauge of requests under way, which a task after the response counts down


async def asked(
    body: dict[str, Any], *, states: Exception | None = None, status: int = 200
) -> tuple[Any, int]:
    """An answer (or error) to a completion with memories or a capture, and the gauge after it."""
    client = SimpleNamespace(discard=AsyncMock(), announce=AsyncMock(return_value="k"))
    client.captured_states = AsyncMock(side_effect=states)
    resolver = SimpleNamespace(resolve=lambda *args, refuse: PROMPT)
    canary = SimpleNamespace(check=AsyncMock())
    admission = Admission({}, AsyncMock(return_value=set()), 1, 1)
    admits = SimpleNamespace(admit=AsyncMock(return_value=Admitted(admission)))
    parts = {"resolver": resolver, "engine_client": client, "canary": canary, "admission": admits}
    front = SimpleNamespace(**parts, tenants=Tenants(), editions=Editions(cast(Any, client)))
    models = SimpleNamespace(is_base_model=lambda name: True)
    state = SimpleNamespace(
        awareness=front, openai_serving_models=models, enable_server_load_tracking=True
    )
    raw: Any = SimpleNamespace(
        app=SimpleNamespace(state=state), query_params={}, headers={}, json=AsyncMock()
    )
    raw.json.return_value = body
    capture = Capture(
        cast(Any, front),
        "",
        "name",
        "text",
        Tokens([1], np.zeros((1, 2))),
        "k",
        Admitted(admission),
    )

    @load_aware_call
    async def handler(request: Any, raw_request: Any) -> JSONResponse:
        return JSONResponse({"text": "t"}, status)

    async def insert(front: Any, prompt: Prompt) -> Prompt:
        return prompt

    request = CompletionRequest(prompt="hi")
    try:
        if "memory" in body:
            answered = await capture.finish(handler(request, raw))
        else:
            answered = await answer(request, raw, insert, handler)
        await answered.background()
    except (AwarenessError, OSError) as error:
        answered = error
    return answered, state.server_load_metrics


@pytest.mark.parametrize("status", [200, 400])
def test_the_gauge_goes_back_after_a_request_with_memories(status: int) -> None:
    answered, gauge = asyncio.run(asked({"memory_ids": ["mem_a"]}, status=status))
    assert answered.headers["X-Awareness-Memories"] == "mem_a"
    assert gauge == 0


def test_the_gauge_goes_back_after_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Capture, "_publish", lambda self, states: Path("mem_new.safetensors"))
    body = {"memory": {"capture": "name"}}
    answered, gauge = asyncio.run(asked(body))
    assert json.loads(answered.body)["memory"]["id"] == "mem_new"
    assert answered.headers["X-Awareness-Captured"] == "mem_new"
    assert gauge == 0
    assert asyncio.run(asked(body, status=400))[1] == 0
    for error in (AwarenessError("not captured"), OSError("no space left")):
        answered, gauge = asyncio.run(asked(body, states=error))
        assert (answered, gauge) == (error, 0)


# A stored response


@pytest.mark.parametrize("metadata", [None, {}, {"other": "x"}])
def test_a_conversation_without_memories_goes_on(metadata: Any) -> None:
    check_previous(cast(Any, SimpleNamespace(metadata=metadata)))
    check_previous(None)


def test_a_conversation_with_memories_does_not_go_on_without_them() -> None:
    with pytest.raises(UnsupportedRequest, match="memory_ids"):
        check_previous(cast(Any, SimpleNamespace(metadata={"memory_ids": "mem_a"})))
