"""Memories for vLLM's offline `LLM`: its arguments, and prompts after memories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.connector.worker_extension import BIND, CALL, CHECK_READ_BACK, signed
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.passages import failure, sampling_params
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.registry import absolute_registry, registry_memories
from awareness_vllm.serving.request import MemoryRequest, Tokens
from awareness_vllm.serving.resolver import MemoryResolver
from awareness_vllm.serving.served_model import ServedModel

if TYPE_CHECKING:
    from vllm import LLM


class OfflineMemories:
    """Memories for one model.

        memories = OfflineMemories(model, store, wmatrices=["pair.wmatrix"])
        llm = memories.attach(LLM(model, **memories.engine_args))
        prompt, extra_args = memories.prompt("What …?", ["mem_…"])
        llm.generate(prompt, SamplingParams(max_tokens=16, extra_args=extra_args))

    Raises:
        BadInput, WMatrixCorrupt: a configuration that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        store: str | Path,
        wmatrices: Sequence[str | Path] = (),
        **more: Any,
    ) -> None:
        if more.get("registry"):
            more["registry"] = absolute_registry(str(more["registry"]))
        self.config = ServingConfig.parse(
            {"store": str(store), "wmatrices": tuple(map(str, wmatrices)), **more}
        )
        self.resolver = MemoryResolver.from_config(
            self.config, ServedModel.read(model, max_model_len=0)
        )
        self.remote = registry_memories(self.config, self.resolver.trust)
        self.llm: LLM | None = None

    @property
    def engine_args(self) -> dict[str, Any]:
        """Further arguments of `LLM`."""
        return {
            "kv_transfer_config": transfer_config(self.config),
            "worker_extension_cls": WORKER_EXTENSION,
        }

    def attach(self, llm: LLM) -> LLM:
        """Lend the engine's embedding to the connector, and its context window to the prompts, once
        before the first of them; the same `llm`."""
        llm.collective_rpc(CALL, args=signed(BIND))
        if not any(llm.collective_rpc(CALL, args=signed(CHECK_READ_BACK))):
            self.llm = llm
        self.set_window(llm.llm_engine.model_config.max_model_len)
        return llm

    def set_window(self, max_model_len: int) -> None:
        """Make prompts for an engine with a context window of so many tokens."""
        model = ServedModel.read(self.resolver.model.folder, max_model_len)
        self.resolver = self.resolver.with_model(model)

    def prompt(
        self,
        text: str | Sequence[int],
        memory_ids: Sequence[str],
        *,
        quality_target: float | None = None,
        on_low_quality: Literal["recompute", "fail", "use"] = "recompute",
        reread: Tokens = "auto",
        quote: Tokens = "auto",
        caller_salt: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A text, or its ids, after memories: a prompt for `LLM.generate`, and `extra_args` for its
        parameters. What the text points at is quoted, or read now by the attached engine, as a
        server would: up to `quote` and `reread` tokens of each memory.

        Raises:
            AwarenessError: what a server answers with a 4xx.
        """
        request = MemoryRequest(
            ids=tuple(memory_ids),
            quality_target=quality_target,
            on_low_quality=on_low_quality,
            reread=reread,
            quote=quote,
        )
        self._pull(memory_ids)
        memories = self.resolver.resolve(request, "", caller_salt)
        tokenizer = load_tokenizer(str(self.resolver.model.folder))
        question = text if isinstance(text, str) else tokenizer.decode(list(text))
        if isinstance(text, str):
            text = tokenize(tokenizer, text).ids
        memories = self.resolver.quoted(memories, [question], len(text))
        memories = self.with_passages(memories, question)
        prompt = {"prompt_token_ids": self.resolver.append_question(memories, list(text))}
        params = memories.params
        if params is None:
            return prompt, {}
        salted = {**prompt, "cache_salt": params.cache_salt}
        return salted, {"kv_transfer_params": kv_transfer_params(params)}

    def _pull(self, memory_ids: Sequence[str]) -> None:
        """Have the memories that are in the registry alone in the cache, as a server does."""
        if self.remote is None:
            return
        for memory in memory_ids:
            if self.resolver.stores[""].has(memory):
                continue
            offer = self.remote.look(memory)
            self.resolver.check_listing(offer.listing)
            self.remote.pull(offer)

    def with_passages(self, prompt: Prompt, question: str) -> Prompt:
        """The prompt with the passages laid over that a question points at; as it is without an
        engine that can read them."""
        if self.llm is None or not (requests := prompt.passage_requests(question)):
            return prompt
        prompts: Any = [
            {"prompt_token_ids": request.ids, "cache_salt": request.plan.cache_salt}
            for request in requests
        ]
        params = [sampling_params(request) for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        outcomes = [failure(output.kv_transfer_params) for output in outputs]
        return prompt.with_passages([*zip(requests, outcomes, strict=True)])
