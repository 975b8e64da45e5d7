"""The model that a server runs, as its front end and its workers both see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from awareness_vllm.kernels import largest
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import load_tokenizer, prefix_ids

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class ServedModel:
    """A model's `folder`, its context window of `max_model_len` tokens, the `geometry` of its KV
    cache (LongRoPE's positions depend on the window), and the ids `prefix` that its tokenizer puts
    before every text. `largest` is the greatest magnitude of a state in its cache, which is of a
    `dtype` of the server's choice, None for the model's own, and `rounds` states where it is in
    fp8."""

    folder: Path
    max_model_len: int
    geometry: Geometry
    prefix: tuple[int, ...] = ()
    largest: float = math.inf
    dtype: torch.dtype | None = None
    rounds: bool = False

    @classmethod
    def read(cls, model: str | Path, max_model_len: int) -> ServedModel:
        """The model in a folder, or by a name that vLLM has downloaded.

        Raises:
            UnsupportedModel: its config, weights or tokenizer cannot be read.
        """
        folder = resolve_folder(model)
        prefix = tuple(prefix_ids(load_tokenizer(str(folder))))
        return cls(folder, max_model_len, geometry_of(folder, max_model_len), prefix)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> ServedModel:
        """The model that a vLLM server was started with. Raises UnsupportedModel."""
        model = vllm_config.model_config
        # A name only in what the user passes; vLLM has resolved it by now.
        dtype = cast(torch.dtype, model.dtype)
        rounds = vllm_config.cache_config.cache_dtype.startswith("fp8")
        read = cls.read(model.model, model.max_model_len)
        return replace(read, largest=largest(dtype), dtype=dtype, rounds=rounds)

    def without_prefix(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text without the tokenizer's prefix, however often it stands before them: a
        text may spell the BOS that the tokenizer adds."""
        begin, count = 0, len(self.prefix)
        while count and tuple(ids[begin : begin + count]) == self.prefix:
            begin += count
        return list(ids[begin:])
