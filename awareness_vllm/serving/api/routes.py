"""The `vllm.endpoint_plugins` entry: memories on completions, chat, responses and messages.

Our routes replace vLLM's at the same paths and call vLLM's own handlers. A request without memories
passes through untouched. With them, the prompt is rendered by vLLM, the memories' ids are put where
they belong, and everything that can refuse the request does so here, as a 4xx.
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
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger

from awareness_vllm.compatibility.target import QUANTIZATIONS, CacheDtype, TargetConfig
from awareness_vllm.errors import AwarenessError, UnsupportedRequest
from awareness_vllm.serving.api import memories as catalogue
from awareness_vllm.serving.api.capture import announce
from awareness_vllm.serving.api.chat_template import mark, split
from awareness_vllm.serving.api.engine_client import MemoryEngineClient
from awareness_vllm.serving.api.validation import check_carried, refuse_memories
from awareness_vllm.serving.config import CONNECTOR, PARAMS_KEY, ServingConfig
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import BIND
from awareness_vllm.serving.http import answer_unauthorized, client_error, memories_of, tenant_of
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.request import LONG, SHORT, parse_memory_request
from awareness_vllm.serving.resolver import Memories, Prompt

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.inputs import TokensInput

logger = init_logger("vllm.awareness.endpoints")

AnyRequest = CompletionRequest | ChatCompletionRequest | ResponsesRequest | AnthropicMessagesRequest
Render = Callable[[str], Awaitable[Any]]
"""Renders a chat with a mark where memories belong; gives vLLM's ErrorResponse, or what it has of
the prompt."""

Use = Callable[[Prompt], Awaitable[Prompt | None]]
"""Puts a resolved prompt into a request; gives it as it is used, None where vLLM itself refuses the
request."""

router = APIRouter(dependencies=[Depends(validate_json_request)])


class AwarenessEndpoints:
    """Attaches the routes and, once the engine runs, what they need to resolve memories."""

    name = "awareness"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.include_router(catalogue.router)
        answer_unauthorized(app)
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
        model = engine_client.vllm_config.model_config
        memories = await asyncio.to_thread(Memories, config, model.model, model.max_model_len)
        await engine_client.collective_rpc(BIND)
        ours = MemoryEngineClient(engine_client)
        await ours.pin(memories, config.pin)
        state.awareness, state.awareness_engine_client = memories, ours
        state.awareness_target = target_config(engine_client.vllm_config, config.tail)
        logger.info("memories are served from %s", config.store)


def target_config(vllm_config: VllmConfig, tail: int) -> TargetConfig:
    """How this server serves its model, for reports about memories."""
    cache = vllm_config.cache_config
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return TargetConfig(
        quantization=next((name for name, d in QUANTIZATIONS.items() if d == dtype), None),
        # Of names that nobody here knows, the model's own dtype is the nearest.
        kv_cache_dtype=cache.cache_dtype if cache.cache_dtype in get_args(CacheDtype) else "auto",
        context_length=vllm_config.model_config.max_model_len,
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

    async def use(prompt: Prompt) -> Prompt | None:
        handler = completion_routes.completion(raw_request)
        assert handler is not None  # this plugin loads only where the task is "generate"
        rendered = await handler.render_completion_request(request)
        if isinstance(rendered, ErrorResponse):
            return None
        prompts = cast("list[TokensInput]", rendered)  # of text: embeddings are refused
        memories = memories_of(raw_request)
        request.prompt = [
            memories.whole(prompt, memories.without_prefix(one["prompt_token_ids"]))
            for one in prompts
        ]
        request.add_special_tokens = False
        carry(request, prompt)
        return prompt

    return await answered(request, raw_request, use, completion_routes.create_completion)


@router.post(
    "/v1/chat/completions", responses=route_of(chat_routes, "/v1/chat/completions").responses
)
async def create_chat_completion(request: ChatCompletionRequest, raw_request: Request) -> Any:
    """vLLM's chat completions; the memories stand in the first user turn."""

    async def render(text: str) -> Any:
        return await rendered_chat(chat_routes.chat(raw_request), request, text)

    use = in_chat(request, raw_request, render)
    return await answered(request, raw_request, use, chat_routes.create_chat_completion)


@router.post("/v1/responses", responses=route_of(response_routes, "/v1/responses").responses)
async def create_responses(request: ResponsesRequest, raw_request: Request) -> Any:
    """vLLM's responses; the memories stand in the first user turn."""

    async def render(text: str) -> Any:
        handler = response_routes.responses(raw_request)
        assert handler is not None
        marked = copied(request, input=mark(request.input, text))
        rendered = await handler.online_renderer.render_responses(marked)
        return rendered if isinstance(rendered, ErrorResponse) else rendered.engine_input

    use = in_chat(request, raw_request, render)
    return await answered(request, raw_request, use, response_routes.create_responses)


@router.post("/v1/messages", responses=route_of(message_routes, "/v1/messages").responses)
async def create_messages(request: AnthropicMessagesRequest, raw_request: Request) -> Any:
    """vLLM's Anthropic messages; the memories stand in the first user turn."""

    async def render(text: str) -> Any:
        handler = message_routes.messages(raw_request)
        return await rendered_chat(handler, handler.to_chat_completion_request(request), text)

    use = in_chat(request, raw_request, render)
    try:
        return await answered(request, raw_request, use, message_routes.create_messages)
    except VLLMClientError as error:  # in the form that clients of this API expect
        return message_routes.translate_error_response(create_error_response(error))


async def rendered_chat(
    handler: OpenAIServingChat | None, request: ChatCompletionRequest, text: str
) -> Any:
    """What vLLM's chat handler makes of a request with `text` where memories belong."""
    assert handler is not None  # this plugin loads only where the task is "generate"
    marked = copied(request, messages=mark(request.messages, text))
    rendered = await handler.render_chat_request(marked)
    return rendered if isinstance(rendered, ErrorResponse) else rendered[1][0]


async def answered(
    request: AnyRequest,
    raw_request: Request,
    use: Use,
    handler: Callable[[Any, Request], Awaitable[Any]],
) -> Any:
    """vLLM's answer to a request, with its memories put to use and reported."""
    drop_forged(request)
    try:
        check_extras(request)
        body = request.model_extra
        asked = parse_memory_request(await raw_request.json() if body is None else body)
        if asked is None:
            return await handler(request, raw_request)
        check_request(request, raw_request)
        if asked.capture is not None:
            capture = await announce(request, raw_request, asked.capture)
            return await capture.answered(handler(request, raw_request))
        memories, tenant = memories_of(raw_request), tenant_of(raw_request)
        prompt = await asyncio.to_thread(memories.resolve, asked, tenant, request.cache_salt)
        used = await use(prompt)
    except AwarenessError as error:
        raise client_error(error) from error
    response = await handler(request, raw_request)  # where `use` found a fault, it says so
    # No response at all: the client has gone.
    return reported(response, used) if used and response else response


def drop_forged(request: AnyRequest) -> None:
    """Take out of a client's `kv_transfer_params` what only this file may put there."""
    if request.kv_transfer_params:
        ours = (PARAMS_KEY, CAPTURE_KEY)
        kept = {k: v for k, v in request.kv_transfer_params.items() if k not in ours}
        request.kv_transfer_params = kept or None


def check_extras(request: AnyRequest) -> None:
    """Refuse extras of a request that vLLM's engine would choke on, with memories or without."""
    xargs = getattr(request, "vllm_xargs", None)
    for name, value in (("kv_transfer_params", request.kv_transfer_params), ("vllm_xargs", xargs)):
        if value:
            check_carried(name, value)
    if xargs and "kv_transfer_params" in xargs:
        raise UnsupportedRequest(
            "vllm_xargs overrides a field of its own",
            found="kv_transfer_params in vllm_xargs",
            expected="kv_transfer_params beside it",
        )


def in_chat(request: AnyRequest, raw_request: Request, render: Render) -> Use:
    """How a chat uses a prompt's memories: after the template's head, before the user's words."""

    async def use(prompt: Prompt) -> Prompt | None:
        text = secrets.token_hex(16)
        rendered = await render(text)
        if isinstance(rendered, ErrorResponse):
            return None
        head, rest = split(rendered.get("prompt") or "", text)
        engine_client: MemoryEngineClient = raw_request.app.state.awareness_engine_client
        placed = prompt.after(engine_client.tokens(head))
        if (
            placed.head
            and placed.tail is not None
            and not await engine_client.keeps_head(placed.head)
        ):
            placed = placed.natively()
        ids = memories_of(raw_request).whole(placed, engine_client.tokens(rest))
        carry(request, placed)["prompt_token_ids"] = ids
        return placed

    return use


def carry(request: AnyRequest, prompt: Prompt) -> dict[str, Any]:
    """Tell the connector which memories to load, and the prefix cache whose blocks these are.

    Returns:
        the request's own `kv_transfer_params`.
    """
    carried = dict(request.kv_transfer_params or {})
    if (params := prompt.params) is not None:
        request.cache_salt = params.cache_salt
        carried = kv_transfer_params(params, carried)
    request.kv_transfer_params = carried
    return carried


def copied(request: Any, **update: Any) -> Any:
    """A request to render: rendering must not use up what the request itself carries."""
    return request.model_copy(update={**update, "kv_transfer_params": None})


def check_request(request: AnyRequest, raw_request: Request) -> None:
    """Refuse fields with which a memory would be ignored in silence, cut in two, or wrong."""
    adapters = raw_request.app.state.openai_serving_models.lora_requests
    refused = {
        "prompt_logprobs": getattr(request, "prompt_logprobs", None) is not None,
        "echo": bool(getattr(request, "echo", False)),
        "truncate_prompt_tokens": getattr(request, "truncate_prompt_tokens", None) is not None,
        "use_beam_search": bool(getattr(request, "use_beam_search", False)),
        "prompt_embeds": getattr(request, "prompt_embeds", None) is not None,
        "previous_response_id": getattr(request, "previous_response_id", None) is not None,
        "a LoRA adapter": request.model in adapters,
    }
    for field, present in refused.items():
        if present:
            raise UnsupportedRequest(
                f"{SHORT} cannot be combined with {field}",
                found=field,
                expected=f"{SHORT} without it",
                remedy=f"leave out {field}, or send the memory's text in the prompt",
            )


def reported(response: Response, prompt: Prompt) -> Response:
    """The response with what it used: in headers, and, unless it is a stream, in its body, where
    the engine's own report is added: how warm the memories were, and how long they took."""
    report = prompt.report()
    kept = [figure for figure in report["retention"] if figure is not None]
    response.headers["X-Awareness-Memories"] = ",".join(report["ids"])
    response.headers["X-Awareness-Plan"] = report["plan"]
    response.headers["X-Awareness-Tokens"] = str(report["tokens"])
    if len(kept) == len(report["ids"]):
        response.headers["X-Awareness-Retention"] = f"{min(kept):.3f}"
    if not isinstance(response, JSONResponse) or response.status_code != 200:
        return response
    body = json.loads(bytes(response.body))
    carried = body.get("kv_transfer_params") or {}
    body[LONG] = {**report, **carried.pop(PARAMS_KEY, {})}
    if "kv_transfer_params" in body:
        body["kv_transfer_params"] = carried or None
    headers = {k: v for k, v in response.headers.items() if k != "content-length"}
    return JSONResponse(body, headers=headers)
