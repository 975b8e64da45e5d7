"""The `vllm.endpoint_plugins` entry: `memory_ids` on completions and chat completions.

Our routes replace vLLM's at the same paths and call vLLM's own handlers. A request without
`memory_ids` passes through untouched. With them, the prompt is rendered by vLLM, the memory's ids
are put before it, and everything that can refuse the request does so here, as a 4xx.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import State
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import (
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.logger import init_logger

from awareness_vllm.errors import AwarenessError, ContextTooLong, UnsupportedRequest
from awareness_vllm.serving.config import CONNECTOR, ServingConfig
from awareness_vllm.serving.extension import BIND
from awareness_vllm.serving.memories import Memories, Resolved, kv_transfer_params

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.inputs import TokensInput

logger = init_logger("vllm.awareness.endpoints")

FIELD = "memory_ids"
AnyRequest = TypeVar("AnyRequest", CompletionRequest, ChatCompletionRequest)

router = APIRouter(dependencies=[Depends(validate_json_request)])
COMPLETIONS = cast(APIRoute, completion_routes.router.routes[0])
CHAT_COMPLETIONS = cast(APIRoute, chat_routes.router.routes[0])


class AwarenessEndpoints:
    """Attaches the routes and, once the engine runs, what they need to resolve memories."""

    name = "awareness"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        state.awareness = None
        if engine_client is None:
            return
        transfer = engine_client.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            logger.warning(
                "memories are off: start with `awareness serve`, or --kv-transfer-config"
            )
            return
        config = ServingConfig.parse(transfer.kv_connector_extra_config)
        model = engine_client.vllm_config.model_config
        state.awareness = await asyncio.to_thread(
            Memories, config, model.model, model.max_model_len
        )
        await engine_client.collective_rpc(BIND)
        logger.info("memories are served from %s", config.store)


@router.post("/v1/completions", responses=COMPLETIONS.responses)
async def create_completion(request: CompletionRequest, raw_request: Request) -> Any:
    """vLLM's completions, and `memory_ids`: answered as if the memory had been read first."""
    if FIELD in (request.model_extra or {}):
        handler = completion_routes.completion(raw_request)
        assert handler is not None  # this plugin loads only where the task is "generate"
        memory, salt = await _memory(request, raw_request)
        rendered = await handler.render_completion_request(request)
        if not isinstance(rendered, ErrorResponse):
            _use(request, memory, salt)
            prompts = cast("list[TokensInput]", rendered)  # of text: embeddings are refused
            request.prompt = [
                _expand(memory, prompt["prompt_token_ids"], raw_request) for prompt in prompts
            ]
            request.add_special_tokens = False
    return await completion_routes.create_completion(request, raw_request)


@router.post("/v1/chat/completions", responses=CHAT_COMPLETIONS.responses)
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Any:
    """vLLM's chat completions, and `memory_ids`: the memory stands before the conversation."""
    if FIELD in (request.model_extra or {}):
        handler = chat_routes.chat(raw_request)
        assert handler is not None  # this plugin loads only where the task is "generate"
        memory, salt = await _memory(request, raw_request)
        rendered = await handler.render_chat_request(request)
        if not isinstance(rendered, ErrorResponse):
            params = _use(request, memory, salt)
            prompt = cast("TokensInput", rendered[1][0])
            ids = _expand(memory, prompt["prompt_token_ids"], raw_request)
            params["prompt_token_ids"] = ids
    return await chat_routes.create_chat_completion(request, raw_request)


async def _memory(request: AnyRequest, raw_request: Request) -> tuple[Resolved, str | None]:
    """Resolve the request's memory and refuse what cannot be honoured, as vLLM's client errors."""
    memories: Memories | None = raw_request.app.state.awareness
    ids = (request.model_extra or {}).pop(FIELD)
    try:
        _check_request(request, ids)
        if memories is None:
            raise UnsupportedRequest(
                "this server serves no memories",
                found="no awareness connector",
                expected=f"--kv-transfer-config with {CONNECTOR}",
                remedy="start the server with `awareness serve`",
            )
        return await asyncio.to_thread(memories.resolve, ids[0]), request.cache_salt
    except AwarenessError as error:
        raise client_error(error) from error


def _check_request(request: AnyRequest, ids: object) -> None:
    """Refuse fields with which a memory would be ignored in silence or cut in two."""
    if not isinstance(ids, list) or len(ids) != 1:
        raise UnsupportedRequest(
            f"{FIELD} is not usable",
            found=repr(ids)[:80],
            expected="a list with one memory ID",
            remedy='send {"memory_ids": ["mem_…"]}',
        )
    refused = {
        "prompt_logprobs": request.prompt_logprobs is not None,
        "echo": bool(request.echo),
        "truncate_prompt_tokens": request.truncate_prompt_tokens is not None,
        "use_beam_search": bool(request.use_beam_search),
        "prompt_embeds": getattr(request, "prompt_embeds", None) is not None,
    }
    for field, present in refused.items():
        if present:
            raise UnsupportedRequest(
                f"{FIELD} cannot be combined with {field}",
                found=field,
                expected=f"{FIELD} without it",
                remedy=f"leave out {field}, or send the memory's text in the prompt",
            )


def _use(request: AnyRequest, memory: Resolved, caller_salt: str | None) -> dict[str, Any]:
    """Tell the connector which memory to load, and the prefix cache whose blocks these are.

    Returns:
        the request's own `kv_transfer_params`.
    """
    params = memory.params(caller_salt)
    request.cache_salt = params.cache_salt
    carried = kv_transfer_params(params, request.kv_transfer_params)
    request.kv_transfer_params = carried
    return carried


def _expand(memory: Resolved, ids: list[int], raw_request: Request) -> list[int]:
    """The memory's ids, then the prompt's own. Raises a 400 when they do not fit."""
    memories: Memories = raw_request.app.state.awareness
    own, limit = memories.without_prefix(ids), memories.max_model_len
    found = f"{len(memory.ids)} tokens of memory and {len(own)} of prompt"
    try:
        if not own:
            raise UnsupportedRequest(
                "the prompt is empty",
                found=found,
                expected="at least one token to answer",
                remedy="put the question into the prompt",
            )
        if len(memory.ids) + len(own) >= limit:
            raise ContextTooLong(
                f"memory {memory.memory} does not fit",
                found=found,
                expected=f"fewer than {limit} (max_model_len)",
                remedy="use a shorter memory, or start the server with a larger --max-model-len",
            )
    except AwarenessError as error:
        raise client_error(error) from error
    return [*memory.ids, *own]


def client_error(error: AwarenessError) -> Exception:
    """Our error as the vLLM error that its HTTP layer answers with the same status."""
    if error.status == 404:
        return VLLMNotFoundError(str(error))
    if error.status == 422:
        return VLLMUnprocessableEntityError(str(error), parameter=FIELD)
    return VLLMValidationError(str(error), parameter=FIELD)
