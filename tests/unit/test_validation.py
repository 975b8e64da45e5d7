"""Refused before the engine: extras that it would die of, models that may be adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.api.validation import (
    MAX_DEPTH,
    check_engine_extras,
    check_request,
    may_be_adapter,
)

pytestmark = pytest.mark.unit


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=10,
    )
)
def test_ordinary_extras_pass(value: Any) -> None:
    check_engine_extras("kv_transfer_params", value)


@pytest.mark.parametrize(
    "wrap", [lambda x: [x], lambda x: {"a": x}, lambda x: [{"a": [1], "b": x}]]
)
def test_extras_that_nest_too_deep_are_refused(wrap: Any) -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH + 1):
        value = wrap(value)
    with pytest.raises(UnsupportedRequest, match="levels"):
        check_engine_extras("kv_transfer_params", value)


@pytest.mark.parametrize("value", ["\ud800", ["\udfff"], {"\ud800": 1}, {"a": {"b": "x\ud800"}}])
def test_extras_that_are_not_unicode_are_refused(value: Any) -> None:
    with pytest.raises(UnsupportedRequest, match="Unicode"):
        check_engine_extras("vllm_xargs", value)


@pytest.mark.parametrize(
    ("name", "lora", "loaded", "environment", "expected"),
    [
        ("base", True, (), {}, False),
        ("", True, (), {}, False),
        ("adapter", True, ("adapter",), {}, True),
        ("adapter", True, (), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, True),
        # vLLM's own 404, or another name of the base model.
        ("adapter", True, (), {}, False),
        ("adapter", False, (), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, False),
        ("alias", True, (), {"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"}, False),
    ],
)
def test_a_name_that_vllm_may_resolve_to_an_adapter(
    name: str,
    lora: bool,
    loaded: tuple[str, ...],
    environment: dict[str, str],
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SKIP_MODEL_NAME_VALIDATION"):
        monkeypatch.setenv(variable, environment.get(variable, "0"))
    config = SimpleNamespace(lora_config=object() if lora else None)
    models = SimpleNamespace(
        is_base_model=lambda asked: asked == "base",
        lora_requests=dict.fromkeys(loaded),
        engine_client=SimpleNamespace(vllm_config=config),
    )
    assert may_be_adapter(models, SimpleNamespace(model=name)) is expected


TEXT = {"type": "text", "text": "what is it?"}
MEDIA = [
    {"type": "image_url", "image_url": {"url": "data:,"}},
    {"image_url": {"url": "data:,"}},
    {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "data:,"}},
]


@pytest.mark.parametrize("part", [TEXT, *MEDIA], ids=str)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_a_chat_with_more_than_text_is_refused_as_it_came(part: dict[str, Any], role: str) -> None:
    """vLLM renders such a chat again, without the memories. It may have made iterators of the
    messages' contents by then, into which its own look for images does not go."""
    message = {"role": role, "content": [TEXT, part]}
    request = ChatCompletionRequest(messages=[{"role": "user", "content": "hello"}])
    request.messages.append({**message, "content": iter(message["content"])})  # type: ignore[arg-type, typeddict-item]
    models = SimpleNamespace(is_base_model=lambda name: True)
    raw: Any = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace()))
    raw.app.state.openai_serving_models = models
    body = {"messages": [{"role": "user", "content": "hello"}, message]}
    if part is TEXT:
        check_request(request, raw, "memory_ids", body)
        return
    with pytest.raises(UnsupportedRequest, match="a message with more than text"):
        check_request(request, raw, "memory_ids", body)
