"""Memories for vLLM's offline `LLM`: its arguments, and prompts after memories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.connector.worker_extension import BIND, CALL, signed
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.request import MemoryRequest
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
        self.config = ServingConfig.parse(
            {"store": str(store), "wmatrices": tuple(map(str, wmatrices)), **more}
        )
        self.resolver = MemoryResolver.from_config(
            self.config, ServedModel.read(model, max_model_len=0)
        )

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
        caller_salt: str | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A text, or its ids, after memories: a prompt for `LLM.generate`, and `extra_args` for its
        parameters.

        Raises:
            AwarenessError: what a server answers with a 4xx.
        """
        request = MemoryRequest(
            ids=tuple(memory_ids), quality_target=quality_target, on_low_quality=on_low_quality
        )
        memories = self.resolver.resolve(request, "", caller_salt)
        if isinstance(text, str):
            text = tokenize(load_tokenizer(str(self.resolver.model.folder)), text).ids
        prompt = {"prompt_token_ids": self.resolver.append_question(memories, list(text))}
        params = memories.params
        if params is None:
            return prompt, {}
        salted = {**prompt, "cache_salt": params.cache_salt}
        return salted, {"kv_transfer_params": kv_transfer_params(params)}
