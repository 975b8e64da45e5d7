"""Responses, messages and their counts over HTTP: our routes and vLLM's route functions are the
real ones, its handlers render a chat as plain lines."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.anthropic import serving
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.api_router import router as response_router
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.renderers.online_renderer import ResponsesRenderResult
from vllm.sampling_params import SamplingParams

from awareness_vllm.errors import ContextTooLong
from awareness_vllm.passages.quotes import NO_QUOTES, Quoting
from awareness_vllm.serving.admission import Admission, Admitted
from awareness_vllm.serving.api.editions import Editions
from awareness_vllm.serving.api.routes import AwarenessEndpoints
from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.resolved_memory import ResolvedMemory
from awareness_vllm.serving.tenants import Tenants

pytestmark = pytest.mark.unit

ID = "mem_" + "0" * 32
MEMORY = [2, *range(500, 540)]
QUESTION = "What is it about?"
IDS = {"memory_ids": [ID]}


def lines(messages: list[Any]) -> str:
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


class Messages(AnthropicServingMessages):
    """vLLM's handler of messages, but for its template and its engine."""

    def __init__(self) -> None:
        self._merge_inline_system = True
        # vLLM's own, where it has one: from 0.33 on.
        if resolver := getattr(serving, "DisabledThinkingEffortResolver", None):
            self.disabled_thinking_effort_resolver = resolver(None, "none")

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        text = lines(cast(Any, request.messages))
        return [], [{"prompt": text, "prompt_token_ids": list(text.encode())}]


class Responses:
    """Stands for vLLM's handler of responses with a store: it answers with the number of ids."""

    use_harmony, enable_store = False, True

    def __init__(self) -> None:
        self.response_store: dict[str, ResponsesResponse] = {}
        self.online_renderer = SimpleNamespace(render_responses=self.render)

    async def render(self, request: ResponsesRequest) -> ResponsesRenderResult:
        messages: Any = request.input
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return ResponsesRenderResult(messages, cast(Any, {"prompt": lines(messages)}))

    async def create_responses(self, request: ResponsesRequest, raw: Any) -> ResponsesResponse:
        ids = (request.kv_transfer_params or {}).pop("prompt_token_ids", [])
        response = ResponsesResponse.from_request(
            request, SamplingParams(), model_name="m", created_time=0, output=[],
            status="completed", usage=None, kv_transfer_params={"ids": len(ids)},
        )  # fmt: skip
        if request.store:
            self.response_store[response.id] = response
        return response

    async def retrieve_responses(self, response_id: str, **_: Any) -> ResponsesResponse:
        return self.response_store[response_id]


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.include_router(response_router)
    app.router.routes[:] = [r for r in app.routes if getattr(r, "path", "") != "/v1/responses"]
    AwarenessEndpoints().attach_router(app)
    init_exception_handler(app)
    app.state.openai_serving_responses = Responses()
    app.state.anthropic_serving_messages = Messages()
    app.state.openai_serving_models = SimpleNamespace(is_base_model=lambda name: True)
    memory = ResolvedMemory(ID, "d", "own", None, MEMORY, 1)

    def append(prompt: Prompt, question: list[int]) -> list[int]:
        return [*prompt.ids, *question]

    admission = Admission({}, AsyncMock(return_value=set()), 1, 1)
    app.state.awareness = SimpleNamespace(
        tenants=Tenants(),
        editions=Editions(cast(Any, None)),
        admission=SimpleNamespace(admit=AsyncMock(return_value=Admitted(admission))),
        canary=AsyncMock(),
        resolver=SimpleNamespace(
            resolve=lambda *_, refuse: Prompt((memory,), tail=0),
            append_question=append,
            quoted=lambda prompt, questions, tokens, answer: prompt,
        ),
        engine_client=SimpleNamespace(
            tokenize=lambda text: list(text.encode()),
            ensure_head=AsyncMock(return_value=""),
            forget_head=Mock(),
            ensure_passages=AsyncMock(side_effect=lambda prompt, question: prompt),
        ),
    )
    return TestClient(app)


def ask(client: TestClient, path: str, **body: Any) -> Any:
    return client.post(path, json={"model": "m", **body})


def test_a_chat_that_is_refused_is_no_use_of_its_memories(client: TestClient) -> None:
    front = cast(Any, client.app).state.awareness
    front.editions.use = AsyncMock()
    too_long = ContextTooLong("it does not fit", found=2, expected="fewer than 1")
    front.resolver.append_question = Mock(side_effect=too_long)
    messages = [{"role": "user", "content": QUESTION}]
    answer = ask(client, "/v1/messages", messages=messages, max_tokens=1, **IDS)
    assert answer.status_code == 400
    front.resolver.append_question.assert_called_once()
    front.editions.use.assert_not_called()


@pytest.mark.parametrize(("temperature", "forgotten"), [("recomputed", 1), ("warm", 0)])
def test_a_load_that_failed_may_have_lacked_its_head(
    client: TestClient, temperature: str, forgotten: int
) -> None:
    """Several API servers fill the workers' place for heads without knowing of each other."""
    state = cast(Any, client.app).state
    answered = state.openai_serving_responses.create_responses

    async def create_responses(request: ResponsesRequest, raw: Any) -> ResponsesResponse:
        response = await answered(request, raw)
        response.kv_transfer_params = {PARAMS_KEY: {"temperature": temperature}}
        return response

    state.openai_serving_responses.create_responses = create_responses
    ask(client, "/v1/responses", input=QUESTION, **IDS)
    ensure_head, forget_head = (
        getattr(state.awareness.engine_client, name) for name in ("ensure_head", "forget_head")
    )
    assert forget_head.call_args_list == ensure_head.call_args_list * forgotten
    assert ensure_head.call_args.args[0]


@pytest.mark.parametrize("new", [False, True], ids=["vLLM 0.32", "vLLM 0.33"])
def test_thinking_that_is_switched_off_is_rendered_so(client: TestClient, new: bool) -> None:
    handler = cast(Any, client.app).state.anthropic_serving_messages
    effort, seen = AsyncMock(return_value="low"), []
    render = handler.render_chat_request
    vars(handler).pop("disabled_thinking_effort_resolver", None)
    if new:
        handler.disabled_thinking_effort_resolver = SimpleNamespace(resolve_for=effort)
    else:
        handler._get_disabled_thinking_effort = effort
    handler.render_chat_request = lambda chat: seen.append(chat.reasoning_effort) or render(chat)
    messages = [{"role": "user", "content": QUESTION}]
    thinking = {"type": "disabled"}
    ask(client, "/v1/messages/count_tokens", messages=messages, thinking=thinking, **IDS)
    ask(client, "/v1/messages/count_tokens", messages=messages, **IDS)
    assert seen[0] == "low"
    assert seen[1] != "low"
    effort.assert_awaited_once()


@pytest.mark.parametrize(("turns", "automatic"), [(1, True), (2, False)])
def test_only_a_chats_first_turn_has_quotes_unless_it_says_so(
    client: TestClient, turns: int, automatic: bool
) -> None:
    front, seen = cast(Any, client.app).state.awareness, []
    resolve, quoting = front.resolver.resolve, Quoting(16, automatic=True)
    front.resolver.resolve = lambda *_, refuse: replace(resolve(refuse=refuse), quoting=quoting)
    front.resolver.quoted = lambda prompt, *_: seen.append(prompt.quoting) or prompt
    turn = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "So."}]
    messages = [*turn * (turns - 1), turn[0]]
    ask(client, "/v1/messages/count_tokens", messages=messages, **IDS)
    assert seen == [quoting if automatic else NO_QUOTES]


def test_a_messages_count_has_its_memories(client: TestClient) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    counts = [
        ask(client, "/v1/messages/count_tokens", messages=messages, **body) for body in ({}, IDS)
    ]
    plain, memory = (answer.json()["input_tokens"] for answer in counts)
    assert memory == plain + len(MEMORY) - 1 + len("\n\n")
    assert counts[1].headers["x-awareness-tokens"] == str(len(MEMORY) - 1)
    assert counts[1].json()["memory"]["ids"] == [ID]


def with_image(image: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation with an image in its last turn."""
    words = [
        {"type": image["type"].replace("image", "text").removesuffix("_url"), "text": QUESTION}
    ]
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "So."}]
    return [*turns, {"role": "user", "content": [*words, image]}]


URL = {"url": "data:,"}
ANTHROPICS = with_image({"type": "image", "source": {"type": "url", "url": "data:,"}})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": with_image({"type": "image_url", "image_url": URL})}),
        ("/v1/responses", {"input": with_image({"type": "input_image", "image_url": "data:,"})}),
        ("/v1/messages", {"messages": ANTHROPICS, "max_tokens": 1}),
        ("/v1/messages/count_tokens", {"messages": ANTHROPICS}),
    ],
)
def test_a_chat_with_more_than_text_takes_no_memories(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    refused = ask(client, path, **body, **IDS)
    assert refused.status_code == 400, refused.text
    assert "more than text" in refused.text
    assert ("type" in refused.json()) is path.startswith("/v1/messages")


def test_a_stored_response_names_its_memories(client: TestClient) -> None:
    said = ask(client, "/v1/responses", input=QUESTION, metadata={"mine": "x"}, **IDS).json()
    assert said["kv_transfer_params"]["ids"] > len(MEMORY)
    # Its passages are those that the user's words point at, without what the template adds.
    engine_client = client.app.state.awareness.engine_client  # type: ignore[attr-defined]
    assert engine_client.ensure_passages.await_args.args[1] == QUESTION
    kept = client.get(f"/v1/responses/{said['id']}").json()
    assert kept["metadata"] == said["metadata"] == {"mine": "x", "memory_ids": ID}
    plain = ask(client, "/v1/responses", input=QUESTION).json()
    assert plain["metadata"] is None
    for previous, status in ((said, 400), (plain, 200)):
        more = ask(client, "/v1/responses", input="go on", previous_response_id=previous["id"])
        assert more.status_code == status, more.text
    error = ask(client, "/v1/responses", input="x", previous_response_id=said["id"]).json()["error"]
    assert (error["param"], "memory_ids" in error["message"]) == ("previous_response_id", True)


def test_a_response_that_is_not_stored_keeps_its_metadata(client: TestClient) -> None:
    said = ask(client, "/v1/responses", input=QUESTION, store=False, **IDS).json()
    assert (said["metadata"], said["memory"]["ids"]) == (None, [ID])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": QUESTION, "memory_id": ID}),
        ("/v1/messages", {"max_tokens": 2, "messages": [{"role": "user", "content": "x"}],
                          "extra_body": IDS}),
        ("/v1/completions", {"prompt": "x", "memories": [ID]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}],
                                  "metadata": IDS}),
    ],
)  # fmt: skip
def test_our_routes_refuse_fields_in_the_wrong_place(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    refused = ask(client, path, **body)
    assert refused.status_code == 400
    assert "memory_ids" in refused.json()["error"]["message"]
