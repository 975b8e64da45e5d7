"""Requests on their way to vLLM's handlers, and the served model as reports see it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.serving.api.routes import (
    attach_params,
    strip_reserved_params,
    target_config,
    with_report,
)
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.params import LoadParams
from awareness_vllm.serving.prompt import Prompt, ResolvedMemory
from awareness_vllm.serving.served_model import ServedModel

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


def test_a_response_reports_its_memories() -> None:
    load = {"temperature": "warm", "loaded_tokens": 2, "seconds": 0.1}
    body = {"text": "t", "kv_transfer_params": {PARAMS_KEY: load, "other": 1}}
    response = with_report(JSONResponse(body), PROMPT)
    report = json.loads(bytes(response.body))
    assert report["memory"] == {**PROMPT.report(), **load}
    assert report["kv_transfer_params"] == {"other": 1}
    assert response.headers["X-Awareness-Memories"] == "mem_a"
    assert response.headers["X-Awareness-Plan"] == "load"
    assert response.headers["X-Awareness-Tokens"] == "2"
    assert response.headers["X-Awareness-Retention"] == "1.000"
