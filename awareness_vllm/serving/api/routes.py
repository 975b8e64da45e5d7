"""The `vllm.endpoint_plugins` entry: memories on completions, chat, responses and messages.

Our routes replace vLLM's at the same paths and call vLLM's own handlers. A request without memories
passes through untouched. With them, vLLM renders the prompt, the memories' ids are put where they
belong, and everything that can refuse the request does so here, as a 4xx.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import State
from starlette.responses import JSONResponse
from vllm.entrypoints.anthropic import api_router as message_routes
from vllm.entrypoints.anthropic.protocol import (
    AnthropicContextManagement,
    AnthropicCountTokensRequest,
    AnthropicCountTokensResponse,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.openai.chat_completion import api_router as chat_routes
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion import api_router as completion_routes
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses import api_router as response_routes
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.logger import init_logger

from awareness_vllm.errors import PassageMissing, UnsupportedRequest
from awareness_vllm.serving.api import memories as memory_routes
from awareness_vllm.serving.api.canary import check_sinks
from awareness_vllm.serving.api.capture import announce_capture
from awareness_vllm.serving.api.chat_template import (
    Render,
    insert_mark,
    not_a_chat,
    placed_in_chat,
    render_copy,
    rendered_chat,
)
from awareness_vllm.serving.api.fields import check_fields
from awareness_vllm.serving.api.front_end import build_front_end
from awareness_vllm.serving.api.guard import Guard
from awareness_vllm.serving.api.prefetch import while_connected
from awareness_vllm.serving.api.report import add_report
from awareness_vllm.serving.api.route_order import check_routes
from awareness_vllm.serving.api.validation import (
    check_extras,
    check_request,
    strip_reserved_params,
)
from awareness_vllm.serving.config import CONNECTOR, ServingConfig
from awareness_vllm.serving.connector.metrics import RECOMPUTED
from awareness_vllm.serving.connector.worker_extension import BIND
from awareness_vllm.serving.http import (
    RETRY_AFTER,
    BusyError,
    FrontEnd,
    answer_busy,
    answer_unauthorized,
    caller,
    client_errors,
)
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.request import MEMORY_IDS, parse_memory_request, sent_field
from awareness_vllm.serving.supported import check_engine

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.inputs import TokensInput

logger = init_logger("vllm.awareness.routes")

Message = AnthropicMessagesRequest | AnthropicCountTokensRequest
AnyRequest = CompletionRequest | ChatCompletionRequest | ResponsesRequest | Message
Insert = Callable[[FrontEnd, Prompt], Awaitable[Prompt | None]]
"""Puts a resolved prompt into a request; the prompt as it is used, None where vLLM itself refuses
the request."""

router = APIRouter(dependencies=[Depends(validate_json_request)])
COUNT_TOKENS = "/v1/messages/count_tokens"


class AwarenessEndpoints:
    """Attaches the routes and, once the engine runs, the front end that they work with."""

    name = "awareness"
    required_tasks: ClassVar[tuple[str, ...]] = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        self.app = app
        app.include_router(router)
        app.include_router(memory_routes.router)
        answer_unauthorized(app)
        answer_busy(app)
        ours = frozenset(cast(APIRoute, route).path for route in router.routes)
        # Within what vLLM adds later: CORS, whose headers are for 401 too, and --api-key.
        app.add_middleware(Guard, memory_routes=ours)

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
        check_engine(engine_client.vllm_config)
        check_routes(self.app, [*router.routes, *memory_routes.router.routes])
        config = ServingConfig.parse(transfer.kv_connector_extra_config)
        front = await asyncio.to_thread(build_front_end, config, engine_client)
        await front.engine_client.call(BIND)
        await front.engine_client.check_read_back()
        await check_sinks(front.engine_client, front.resolver)
        if (pulls := front.admission.pulls) is not None:
            await pulls.pull_pins(front.resolver.stores.values(), config.pin)
        await front.engine_client.pin(front.resolver, config.pin)
        state.awareness = front
        logger.info("memories are served from %s", config.store)


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
        # The tokenizer's prefix stands before the memory already.
        questions = [
            resolver.model.without_prefix(one["prompt_token_ids"])
            for one in cast("list[TokensInput]", rendered)
        ]
        for ids in questions:
            resolver.append_question(prompt, ids)  # what is refused is no use of a memory
        prompt = await front.editions.use(prompt)
        # All prompts of a request share its salt, and so what is laid over, and its quotes.
        asked = [*map(front.engine_client.detokenize, questions)]
        tokens = max(map(len, questions), default=0)
        prompt = await asyncio.to_thread(
            resolver.quoted, prompt, asked, tokens, answer_tokens(request)
        )
        request.prompt = [resolver.append_question(prompt, ids) for ids in questions]
        prompt = await reread(front, prompt, "\n".join(asked), raw_request)
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

    insert = chat_insert(request, raw_request, render)
    return await answer(request, raw_request, insert, chat_routes.create_chat_completion)


@router.post("/v1/responses", responses=route_of(response_routes, "/v1/responses").responses)
async def create_responses(request: ResponsesRequest, raw_request: Request) -> Any:
    """vLLM's responses; the memories stand in the first user turn. Of a stored response the
    metadata say which it had."""
    handler = response_routes.responses(raw_request)
    assert handler is not None

    async def render(mark: str) -> Any:
        if handler.use_harmony:
            raise not_a_chat("a model that speaks Harmony, on /v1/responses")
        marked = render_copy(request, input=insert_mark(request.input, mark))
        rendered = await handler.online_renderer.render_responses(marked)
        if isinstance(rendered, ErrorResponse):
            return rendered
        return rendered.messages, rendered.engine_input

    async def insert(front: FrontEnd, prompt: Prompt) -> Prompt | None:
        used = await chat_insert(request, raw_request, render)(front, prompt)
        if used and request.store and handler.enable_store:
            ids = ",".join(memory.id for memory in used.memories)
            request.metadata = {**(request.metadata or {}), MEMORY_IDS: ids}
        return used

    with client_errors("previous_response_id"):
        check_previous(handler.response_store.get(request.previous_response_id or ""))
    return await answer(request, raw_request, insert, response_routes.create_responses)


def check_previous(response: ResponsesResponse | None) -> None:
    """Refuse to go on from a stored response that had memories: vLLM keeps its messages only.

    Raises:
        UnsupportedRequest
    """
    if response is not None and (response.metadata or {}).get(MEMORY_IDS):
        raise UnsupportedRequest(
            "previous_response_id does not bring that response's memories",
            found="a response that was made with memories (its metadata name them)",
            expected=f"the conversation so far in input, with {MEMORY_IDS}",
            remedy=f"send the earlier messages as input, and {MEMORY_IDS} beside it",
        )


@router.post("/v1/messages", responses=route_of(message_routes, "/v1/messages").responses)
async def create_messages(request: AnthropicMessagesRequest, raw_request: Request) -> Any:
    """vLLM's Anthropic messages; the memories stand in the first user turn."""

    insert = chat_insert(request, raw_request, message_render(request, raw_request))
    asked = answer(request, raw_request, insert, message_routes.create_messages)
    return await in_anthropics_form(asked)


@router.post(COUNT_TOKENS, responses=route_of(message_routes, COUNT_TOKENS).responses)
async def count_tokens(request: AnthropicCountTokensRequest, raw_request: Request) -> Any:
    """vLLM's count of a message's tokens, with those of its memories."""
    ids: list[int] = []

    async def insert(front: FrontEnd, prompt: Prompt) -> Prompt | None:
        render = message_render(request, raw_request)
        placed = await placed_in_chat(front, prompt, render, use=False)
        if placed is None:
            return None
        ids[:] = placed.ids
        return placed.prompt

    async def count(request: AnthropicCountTokensRequest, raw_request: Request) -> Any:
        if not ids:
            return await message_routes.count_tokens(request, raw_request)
        whole = AnthropicContextManagement(original_input_tokens=len(ids))
        made = AnthropicCountTokensResponse(input_tokens=len(ids), context_management=whole)
        return JSONResponse(made.model_dump(exclude_none=True))

    return await in_anthropics_form(answer(request, raw_request, insert, count))


async def in_anthropics_form(asked: Awaitable[Any]) -> Any:
    """An answer, or an error in the form that clients of Anthropic's API expect."""
    try:
        return await asked
    except (VLLMClientError, GracefulHTTPError) as error:
        response = message_routes.translate_error_response(create_error_response(error))
        if isinstance(error, BusyError):
            response.headers.update(RETRY_AFTER)
        return response


def message_render(request: Message, raw_request: Request) -> Render:
    async def render(mark: str) -> Any:
        handler = message_routes.messages(raw_request)
        return await rendered_chat(handler, await as_chat(handler, request), mark)

    return render


async def as_chat(handler: AnthropicServingMessages, request: Message) -> ChatCompletionRequest:
    """The chat that vLLM makes of a message, with its system prompts and its thinking."""
    effort: Any = "none"
    if request.thinking is not None and request.thinking.type == "disabled":
        if hasattr(handler, "disabled_thinking_effort_resolver"):  # from vLLM 0.33 on
            effort = await handler.disabled_thinking_effort_resolver.resolve_for(request)
        else:
            effort = await handler._get_disabled_thinking_effort()
    return handler.to_chat_completion_request(
        request,
        merge_inline_system=handler._merge_inline_system,
        disabled_thinking_effort=effort,
    )


async def answer(
    request: AnyRequest,
    raw_request: Request,
    insert: Insert,
    handler: Callable[[Any, Request], Awaitable[Any]],
) -> Any:
    """vLLM's answer to a request, with its memories inserted and reported."""
    strip_reserved_params(request)
    body = await raw_request.json()
    sent = sent_field(body)
    with client_errors(sent):
        check_extras(request)
        check_fields(body, raw_request.query_params)
        memory_request = parse_memory_request(body)
        if memory_request is None:
            return await handler(request, raw_request)
        check_request(request, raw_request, sent, body)
        if memory_request.capture is not None:
            capture = await announce_capture(request, raw_request, memory_request.capture)
            return await capture.finish(handler(request, raw_request))
        front, tenant = caller(raw_request)
        load = await front.admission.admit(tenant, memory_request.ids)

    async def load_and_answer() -> Any:
        with client_errors(sent):
            salt = getattr(request, "cache_salt", None)
            prompt = await asyncio.to_thread(
                front.resolver.resolve, memory_request, tenant, salt, refuse=False
            )
            await front.canary.check(prompt)
            used = await insert(front, prompt)
            if used and used.refusal is not None:
                raise used.refusal
            if not (used and used.loads) or isinstance(request, AnthropicCountTokensRequest):
                load.end()  # nothing is loaded
        response = await handler(request, raw_request)  # where `insert` had no prompt, it says why
        if used and response:  # no response at all: the client has gone
            report = add_report(response, used, front.editions.lost)
            if report.get("reason") == PassageMissing.__name__:
                for memory in used.memories:
                    front.engine_client.passages.forget(memory.id)
            elif report.get("temperature") == RECOMPUTED:
                front.engine_client.forget_head(used.head)
        return response

    return await load.until_answered(load_and_answer())


async def reread(front: FrontEnd, prompt: Prompt, question: str, raw_request: Request) -> Prompt:
    """The prompt with what a question points at re-read; as it was for a client that has gone,
    which vLLM's handler then finds out."""
    ensuring = front.engine_client.ensure_passages(prompt, question)
    return await while_connected(raw_request, ensuring) or prompt


def answer_tokens(request: AnyRequest) -> int:
    """The tokens that an answer may have, 1 where its request does not say."""
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    return next((n for name in names if (n := getattr(request, name, None))), 1)


def chat_insert(request: AnyRequest, raw_request: Request, render: Render) -> Insert:
    """The insertion of memories into a chat: after the template's head, before the user's words."""

    async def insert(front: FrontEnd, prompt: Prompt) -> Prompt | None:
        placed = await placed_in_chat(front, prompt, render, answer_tokens(request))
        if placed is None:
            return None
        client, prompt = front.engine_client, placed.prompt
        if prompt.loads:
            no_head, prompt = await asyncio.gather(
                client.ensure_head(prompt.head),
                reread(front, prompt, placed.question, raw_request),
            )
            if no_head:
                prompt = prompt.recomputed(no_head)
        attach_params(request, prompt)["prompt_token_ids"] = placed.ids
        return prompt

    return insert


def attach_params(request: Any, prompt: Prompt) -> dict[str, Any]:
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
