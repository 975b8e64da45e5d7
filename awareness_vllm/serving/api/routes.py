"""The `vllm.endpoint_plugins` entry: memories on completions, chat, responses and messages.

Our routes replace vLLM's at the same paths and call vLLM's own handlers. A request without memories
passes through untouched. With them, vLLM renders the prompt, the memories' ids are put where they
belong, and everything that can refuse the request does so here, as a 4xx.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_args

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.anthropic import api_router as message_routes
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as response_routes
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.logger import init_logger

from awareness_vllm.compatibility.target import QUANTIZATIONS, CacheDtype, TargetConfig
from awareness_vllm.errors import AwarenessError, UnsupportedRequest
from awareness_vllm.serving.admission import Admission
from awareness_vllm.serving.api import memories as memory_routes
from awareness_vllm.serving.api.canary import Canary, check_sinks
from awareness_vllm.serving.api.capture import announce_capture
from awareness_vllm.serving.api.chat_template import insert_mark, split_at_mark
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.api.validation import check_engine_extras, refuse_memories
from awareness_vllm.serving.config import CONNECTOR, PARAMS_KEY, ServingConfig
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import BIND
from awareness_vllm.serving.http import (
    RETRY_AFTER,
    BusyError,
    FrontEnd,
    answer_busy,
    answer_unauthorized,
    caller,
    client_error,
)
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.request import MEMORY, MEMORY_IDS, parse_memory_request
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel
from awareness_vllm.serving.storage import CaptureLimits
from awareness_vllm.serving.tenants import Tenants

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.inputs import TokensInput

logger = init_logger("vllm.awareness.routes")

AnyRequest = CompletionRequest | ChatCompletionRequest | ResponsesRequest | AnthropicMessagesRequest
Render = Callable[[str], Awaitable[Any]]
"""Renders a chat with a mark where memories belong, into vLLM's ErrorResponse or engine input."""

Insert = Callable[[FrontEnd, Prompt], Awaitable[Prompt | None]]
"""Puts a resolved prompt into a request; the prompt as it is used, None where vLLM itself refuses
the request."""

router = APIRouter(dependencies=[Depends(validate_json_request)])


class AwarenessEndpoints:
    """Attaches the routes and, once the engine runs, the front end that they work with."""

    name = "awareness"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.include_router(memory_routes.router)
        answer_unauthorized(app)
        answer_busy(app)
        refuse_memories(app)

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
        front = await asyncio.to_thread(build_front_end, config, engine_client)
        await front.engine_client.call(BIND)
        await check_sinks(front.engine_client, front.resolver)
        await front.engine_client.pin(front.resolver, config.pin)
        state.awareness = front
        logger.info("memories are served from %s", config.store)


def build_front_end(config: ServingConfig, engine: EngineClient) -> FrontEnd:
    """The front end's parts from the configuration. Raises BadInput, WMatrixCorrupt."""
    model = ServedModel.of(engine.vllm_config)
    resolver, client = MemoryResolver.from_config(config, model), MemoryEngineClient(engine)
    return FrontEnd(
        resolver=resolver,
        tenants=Tenants.read(config.tenants),
        engine_client=client,
        canary=Canary(client),
        target=target_config(engine.vllm_config, model, config.tail),
        admission=Admission(
            resolver.stores, client.loaded, config.max_loads, config.max_load_bytes
        ),
        capture_limits=CaptureLimits.from_config(config),
    )


def target_config(vllm_config: VllmConfig, model: ServedModel, tail: int) -> TargetConfig:
    """How this server serves its model, for reports about memories."""
    cache = vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return TargetConfig(
        quantization=next((name for name, d in QUANTIZATIONS.items() if d == dtype), None),
        # For names that TargetConfig does not have, the model's own dtype is the nearest.
        kv_cache_dtype=cache.cache_dtype if cache.cache_dtype in get_args(CacheDtype) else "auto",
        context_length=model.max_model_len,
        num_gpus=vllm_config.parallel_config.tensor_parallel_size,
        block_size=cache.block_size,
        tail=tail,
    )


def route_of(module: Any, path: str) -> APIRoute:
    """vLLM's own route at a path: ours documents the same responses."""
    return next(route for route in module.router.routes if cast(APIRoute, route).path == path)


@router.post("/v1/completions", responses=route_of(completion_routes, "/v1/completions").responses)
async def create_completion(request: CompletionRequest, raw_request: Request) -> Any:
    """vLLM's completions, answered as if the memories had been read first."""

    async def insert(front: FrontEnd, prompt: Prompt) -> Prompt | None:
        handler = completion_routes.completion(raw_request)
        assert handler is not None  # this plugin loads only where the task is "generate"
        rendered = await handler.render_completion_request(request)
        if isinstance(rendered, ErrorResponse):
            return None
        resolver = front.resolver
        questions = [one["prompt_token_ids"] for one in cast("list[TokensInput]", rendered)]
        # The tokenizer's prefix stands before the memory already.
        request.prompt = [
            resolver.append_question(prompt, ids[resolver.model.prefix_length(ids) :])
            for ids in questions
        ]
        request.add_special_tokens = False
        attach_params(request, prompt)
        return prompt

    return await answer(request, raw_request, insert, completion_routes.create_completion)


@router.post(
    "/v1/chat/completions", responses=route_of(chat_routes, "/v1/chat/completions").responses
)
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Any:
    """vLLM's chat completions; the memories stand in the first user turn."""

    async def render(mark: str) -> Any:
        return await rendered_chat(chat_routes.chat(raw_request), request, mark)

    insert = chat_insert(request, render)
    return await answer(request, raw_request, insert, chat_routes.create_chat_completion)


@router.post("/v1/responses", responses=route_of(response_routes, "/v1/responses").responses)
async def create_responses(request: ResponsesRequest, raw_request: Request) -> Any:
    """vLLM's responses; the memories stand in the first user turn."""

    async def render(mark: str) -> Any:
        handler = response_routes.responses(raw_request)
        assert handler is not None
        marked = render_copy(request, input=insert_mark(request.input, mark))
        rendered = await handler.online_renderer.render_responses(marked)
        return rendered if isinstance(rendered, ErrorResponse) else rendered.engine_input

    insert = chat_insert(request, render)
    return await answer(request, raw_request, insert, response_routes.create_responses)


@router.post("/v1/messages", responses=route_of(message_routes, "/v1/messages").responses)
async def create_messages(request: AnthropicMessagesRequest, raw_request: Request) -> Any:
    """vLLM's Anthropic messages; the memories stand in the first user turn."""

    async def render(mark: str) -> Any:
        handler = message_routes.messages(raw_request)
        return await rendered_chat(handler, handler.to_chat_completion_request(request), mark)

    insert = chat_insert(request, render)
    try:
        return await answer(request, raw_request, insert, message_routes.create_messages)
    except (VLLMClientError, GracefulHTTPError) as error:
        # In the form that clients of this API expect.
        response = message_routes.translate_error_response(create_error_response(error))
        if isinstance(error, BusyError):
            response.headers.update(RETRY_AFTER)
        return response


async def rendered_chat(
    handler: OpenAIServingChat | None, request: ChatCompletionRequest, mark: str
) -> Any:
    """A request's engine input from vLLM's chat handler, with a mark where memories belong."""
    assert handler is not None  # this plugin loads only where the task is "generate"
    marked = render_copy(request, messages=insert_mark(request.messages, mark))
    rendered = await handler.render_chat_request(marked)
    return rendered if isinstance(rendered, ErrorResponse) else rendered[1][0]


async def answer(
    request: AnyRequest,
    raw_request: Request,
    insert: Insert,
    handler: Callable[[Any, Request], Awaitable[Any]],
) -> Any:
    """vLLM's answer to a request, with its memories inserted and reported."""
    strip_reserved_params(request)
    try:
        check_extras(request)
        body = request.model_extra
        memory_request = parse_memory_request(await raw_request.json() if body is None else body)
        if memory_request is None:
            return await handler(request, raw_request)
        check_request(request, raw_request)
        if memory_request.capture is not None:
            capture = await announce_capture(request, raw_request, memory_request.capture)
            return await capture.finish(handler(request, raw_request))
        front, tenant = caller(raw_request)
        load = await front.admission.admit(tenant, memory_request.ids)

        async def load_and_answer() -> Response | None:
            prompt = await asyncio.to_thread(
                front.resolver.resolve, memory_request, tenant, request.cache_salt
            )
            await front.canary.check(prompt)
            used = await insert(front, prompt)
            # Where `insert` had no prompt, it says why; no response at all: the client has gone.
            response = await handler(request, raw_request)
            return with_report(response, used) if used and response else response

        return await load.until_answered(load_and_answer())
    except AwarenessError as error:
        raise client_error(error) from error


def strip_reserved_params(request: AnyRequest) -> None:
    """Remove the fields of a client's `kv_transfer_params` that only this file may set."""
    if request.kv_transfer_params:
        reserved = (PARAMS_KEY, CAPTURE_KEY)
        allowed = {k: v for k, v in request.kv_transfer_params.items() if k not in reserved}
        request.kv_transfer_params = allowed or None


def check_extras(request: AnyRequest) -> None:
    """Refuse extras of a request that vLLM's engine would choke on, with memories or without."""
    xargs = getattr(request, "vllm_xargs", None)
    for name, value in (("kv_transfer_params", request.kv_transfer_params), ("vllm_xargs", xargs)):
        if value:
            check_engine_extras(name, value)
    if xargs and "kv_transfer_params" in xargs:
        raise UnsupportedRequest(
            "vllm_xargs overrides another field of the request",
            found="kv_transfer_params in vllm_xargs",
            expected="kv_transfer_params beside it",
        )


def chat_insert(request: AnyRequest, render: Render) -> Insert:
    """The insertion of memories into a chat: after the template's head, before the user's words."""

    async def insert(front: FrontEnd, prompt: Prompt) -> Prompt | None:
        mark = secrets.token_hex(16)
        rendered = await render(mark)
        if isinstance(rendered, ErrorResponse):
            return None
        head, rest = split_at_mark(rendered.get("prompt") or "", mark)
        engine_client = front.engine_client
        prompt = prompt.with_head(engine_client.tokenize(head))
        if prompt.head and prompt.loads and not await engine_client.ensure_head(prompt.head):
            prompt = prompt.recomputed()
        ids = front.resolver.append_question(prompt, engine_client.tokenize(rest))
        attach_params(request, prompt)["prompt_token_ids"] = ids
        return prompt

    return insert


def attach_params(request: AnyRequest, prompt: Prompt) -> dict[str, Any]:
    """Give a request its load plan for the connector, and the salt of its blocks in the prefix
    cache.

    Returns:
        the request's own `kv_transfer_params`.
    """
    params = dict(request.kv_transfer_params or {})
    if prompt.params is not None:
        request.cache_salt = prompt.params.cache_salt
        params = kv_transfer_params(prompt.params, params)
    request.kv_transfer_params = params
    return params


def render_copy(request: Any, **update: Any) -> Any:
    """A copy to render: rendering must not use up what the request itself carries."""
    return request.model_copy(update={**update, "kv_transfer_params": None})


def check_request(request: AnyRequest, raw_request: Request) -> None:
    """Refuse fields with which a memory would be ignored in silence, cut in two, or wrong."""
    adapters = raw_request.app.state.openai_serving_models.lora_requests
    conflicts = {
        "prompt_logprobs": getattr(request, "prompt_logprobs", None) is not None,
        "echo": bool(getattr(request, "echo", False)),
        "truncate_prompt_tokens": getattr(request, "truncate_prompt_tokens", None) is not None,
        "use_beam_search": bool(getattr(request, "use_beam_search", False)),
        "prompt_embeds": getattr(request, "prompt_embeds", None) is not None,
        "previous_response_id": getattr(request, "previous_response_id", None) is not None,
        "a LoRA adapter": request.model in adapters,
    }
    for field, present in conflicts.items():
        if present:
            raise UnsupportedRequest(
                f"{MEMORY_IDS} cannot be combined with {field}",
                found=field,
                expected=f"{MEMORY_IDS} without it",
                remedy=f"leave out {field}, or send the memory's text in the prompt",
            )


def with_report(response: Response, prompt: Prompt) -> Response:
    """The response with a report on its memories: in headers, and, unless it is a stream, in its
    body, with the engine's own report on the load (temperature, tokens, seconds)."""
    report = prompt.report()
    measured = [figure for figure in report["retention"] if figure is not None]
    response.headers["X-Awareness-Memories"] = ",".join(report["ids"])
    response.headers["X-Awareness-Plan"] = report["plan"]
    response.headers["X-Awareness-Tokens"] = str(report["tokens"])
    if len(measured) == len(report["ids"]):
        response.headers["X-Awareness-Retention"] = f"{min(measured):.3f}"
    if not isinstance(response, JSONResponse) or response.status_code != 200:
        return response
    body = json.loads(bytes(response.body))
    params = body.get("kv_transfer_params") or {}
    body[MEMORY] = {**report, **params.pop(PARAMS_KEY, {})}
    if "kv_transfer_params" in body:
        body["kv_transfer_params"] = params or None
    headers = {k: v for k, v in response.headers.items() if k != "content-length"}
    return JSONResponse(body, headers=headers)
