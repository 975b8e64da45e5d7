"""Fields that name memories where nobody reads them, and fields that are innocent."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import pytest
import vllm.entrypoints
from pydantic import BaseModel

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.api.fields import check_fields, is_similar

pytestmark = pytest.mark.unit

ID = "mem_" + "0" * 32


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"memory_id": ID}, "memory_id"),
        ({"memories": [ID]}, "memories"),
        ({"memories": 7}, "memories"),
        ({"memoryIds": [ID]}, "memoryIds"),
        ({"Memory_IDs": [ID]}, "Memory_IDs"),
        ({"memroy_ids": [ID]}, "memroy_ids"),
        ({"memory_ids[]": ID}, "memory_ids[]"),
        ({"mem_ids": [ID]}, "mem_ids"),
        ({"memory_packages": [ID]}, "memory_packages"),
        ({"memory_ids": [ID], "memories": [ID]}, "memories"),
        ({"extra_body": {"memory_ids": [ID]}}, "extra_body.memory_ids"),
        ({"extra_body": {"memory": {"ids": [ID]}}}, "extra_body.memory"),
        (
            {"memory_ids": [ID], "extra_body": {"memory": {"quality_target": 0.9}}},
            "extra_body.memory",
        ),
        ({"metadata": {"memory_ids": ID}}, "metadata.memory_ids"),
        ({"kv_transfer_params": {"memory": {"ids": [ID]}}}, "kv_transfer_params.memory"),
        ({"vllm_xargs": {"memory_ids": [ID]}}, "vllm_xargs.memory_ids"),
        ({"body": {"extra_body": {"memory_ids": [ID]}}}, "body.extra_body.memory_ids"),
        ({"messages": [{"role": "user", "memory_ids": [ID]}]}, "messages.memory_ids"),
    ],
)
def test_a_field_in_the_wrong_place_is_refused(body: dict[str, Any], parameter: str) -> None:
    with pytest.raises(UnsupportedRequest, match="memory_ids") as caught:
        check_fields({"model": "m", "prompt": "hi", **body}, {})
    assert caught.value.parameter == parameter


@pytest.mark.parametrize("name", ["memory_ids", "memory", "memoryId"])
def test_a_parameter_of_the_url_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedRequest) as caught:
        check_fields({"prompt": "hi"}, {name: ID})
    assert caught.value.parameter == f"?{name}"


SCHEMA = {"type": "object", "properties": {"memory": {"type": "string"}, "memory_ids": {}}}


@pytest.mark.parametrize(
    "body",
    [
        {"memory_ids": [ID]},
        {"memory": {"ids": [ID]}},
        {"memory_ids": [ID], "metadata": {"memory_ids": ID}},
        {"memories": None},
        {"prompt": ID},
        {"user": ID, "cache_salt": ID},
        {"messages": [{"role": "user", "content": f"What is {ID}?", "memory_note": "none"}]},
        {"chat_template_kwargs": {"memory": "a text that the template shows"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {"tools": [{"type": "function", "function": {"name": "memory", "parameters": SCHEMA}}]},
        {"extra_body": {"top_k": 1}},
        {"memory_limit_gib": 4, "memo": "a note", "x" * 10_000: 1},
        [], "memory_ids", None,
    ],
)  # fmt: skip
def test_an_innocent_field_passes(body: Any) -> None:
    check_fields(body, {"timeout": "3"})


@pytest.mark.parametrize("field", ["memory_ids", "memory", "memories"])
def test_a_route_without_memories_takes_none(field: str) -> None:
    with pytest.raises(UnsupportedRequest, match="/v1/other") as caught:
        check_fields({field: [ID]}, {}, "/v1/other")
    assert caught.value.parameter == field
    check_fields({"prompt": "hi", "memory": None}, {}, "/v1/other")


def test_no_field_of_vllms_own_looks_like_ours() -> None:
    names: set[str] = set()
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        # Cohere's needs its own SDK.
        if module.name.endswith("protocol") and "cohere" not in module.name:
            for one in vars(importlib.import_module(module.name)).values():
                if isinstance(one, type) and issubclass(one, BaseModel):
                    names |= set(one.model_fields)
    assert len(names) > 300
    assert [name for name in names if is_similar(name)] == []
