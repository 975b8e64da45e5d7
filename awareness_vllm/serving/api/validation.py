"""Checks before the engine: extras that would kill it, options that exclude memories."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from vllm import envs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.chat_utils import has_non_text_content

from awareness_vllm.errors import UnsupportedRequest
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY

MAX_DEPTH = 32
"""vLLM hands a request's own parameters to its engine by recursion: at 500 levels stock vLLM 0.32
dies of one request."""


def strip_reserved_params(request: Any) -> None:
    """Remove the fields of a client's `kv_transfer_params` that only this server may set."""
    if params := getattr(request, "kv_transfer_params", None):
        reserved = (PARAMS_KEY, CAPTURE_KEY)
        request.kv_transfer_params = {k: v for k, v in params.items() if k not in reserved} or None


def check_extras(request: Any) -> None:
    """Refuse extras of a request that vLLM's engine would choke on, with memories or without."""
    xargs = getattr(request, "vllm_xargs", None)
    params = getattr(request, "kv_transfer_params", None)
    for name, value in (("kv_transfer_params", params), ("vllm_xargs", xargs)):
        if value:
            check_engine_extras(name, value)
    if xargs and "kv_transfer_params" in xargs:
        raise _named(
            "vllm_xargs",
            UnsupportedRequest(
                "vllm_xargs overrides another field of the request",
                found="kv_transfer_params in vllm_xargs",
                expected="kv_transfer_params beside it",
            ),
        )


def check_engine_extras(name: str, value: object) -> None:
    """Refuse extras that vLLM takes from a request as they are and cannot hand to its engine.

    Raises:
        UnsupportedRequest: nested too deep, or text that is not Unicode.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        if not all(_is_unicode(one) for one in level):
            raise _refused(name, "text that is not Unicode", "Unicode")
        level = [inner for one in level for inner in _children(one)]
        if not level:
            return
    raise _refused(name, f"more than {MAX_DEPTH} levels", f"at most {MAX_DEPTH}")


def _children(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(value: object) -> bool:
    return (
        not isinstance(value, str)
        or value.isascii()
        or value.encode(errors="ignore").decode() == value
    )


def _refused(name: str, found: str, expected: str) -> UnsupportedRequest:
    return _named(
        name,
        UnsupportedRequest(
            f"{name} cannot be handed to the engine",
            found=found,
            expected=expected,
            remedy=f"send less in {name}",
        ),
    )


def _named(parameter: str, error: UnsupportedRequest) -> UnsupportedRequest:
    error.parameter = parameter
    return error


def check_request(request: Any, raw_request: Request, sent: str, body: Mapping[str, Any]) -> None:
    """Refuse fields with which a memory, `sent` in that field of the `body`, would be ignored in
    silence, cut in two, or wrong.

    Raises:
        UnsupportedRequest
    """
    conflicts = {
        "prompt_logprobs": getattr(request, "prompt_logprobs", None) is not None,
        "echo": bool(getattr(request, "echo", False)),
        "truncate_prompt_tokens": getattr(request, "truncate_prompt_tokens", None) is not None,
        "use_beam_search": bool(getattr(request, "use_beam_search", False)),
        "prompt_embeds": getattr(request, "prompt_embeds", None) is not None,
        "previous_response_id": getattr(request, "previous_response_id", None) is not None,
        # As it came, since vLLM may have made an iterator of a message's content by now. The other
        # APIs' messages are looked at as the chat that vLLM makes of them.
        "a message with more than text": isinstance(request, ChatCompletionRequest)
        and has_non_text_content(body.get("messages")),
        "a LoRA adapter": may_be_adapter(raw_request.app.state.openai_serving_models, request),
    }
    for field, present in conflicts.items():
        if present:
            raise UnsupportedRequest(
                f"{sent} cannot be combined with {field}",
                found=field if field != "a LoRA adapter" else f"the model {request.model}"[:100],
                expected=f"{sent} without it",
                remedy=f"leave out {field}, or send the memory's text in the prompt",
            )


def may_be_adapter(models: Any, request: Any) -> bool:
    """Whether a request's model is, or by the time that it is answered may be, a LoRA adapter of
    the served one: vLLM loads adapters on request, by resolvers that plugins bring."""
    name = request.model
    if not name or models.is_base_model(name):
        return False
    if name in models.lora_requests:
        return True
    # Without these any other name is unknown, or (the last one) another name of the base model.
    return (
        models.engine_client.vllm_config.lora_config is not None
        and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
        and not envs.VLLM_SKIP_MODEL_NAME_VALIDATION
    )
