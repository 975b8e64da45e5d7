"""Memories for vLLM's offline `LLM`: the arguments that it starts with, and its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.connector.worker_extension import BIND
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.request import MemoryRequest
from awareness_vllm.serving.resolver import Memories

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
        self.memories = Memories(self.config, str(model), max_model_len=0)

    @property
    def engine_args(self) -> dict[str, Any]:
        """What `LLM` is started with, beside its own arguments."""
        return {
            "kv_transfer_config": transfer_config(self.config),
            "worker_extension_cls": WORKER_EXTENSION,
        }

    def attach(self, llm: LLM) -> LLM:
        """Lend the engine's embedding to the connector, once; the same `llm`."""
        llm.collective_rpc(BIND)
        self.memories.serve(llm.llm_engine.model_config.max_model_len)
        return llm

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
        asked = MemoryRequest(
            ids=tuple(memory_ids), quality_target=quality_target, on_low_quality=on_low_quality
        )
        begin = self.memories.resolve(asked, "", caller_salt)
        if isinstance(text, str):
            text = tokenize(load_tokenizer(str(self.memories.folder)), text).ids
        ids = self.memories.whole(begin, list(text))
        if begin.params is None:
            return {"prompt_token_ids": ids}, {}
        salted = {"prompt_token_ids": ids, "cache_salt": begin.params.cache_salt}
        return salted, {"kv_transfer_params": kv_transfer_params(begin.params)}
