"""Log probabilities of continuations by vLLM itself, one request each, by forced generation.

vLLM gives no log probabilities of a prompt's tokens where part of the prompt was loaded. So the
continuation is generated: a logits processor admits one token at a time, and the log probabilities
are those before it (`logprobs_mode` is "raw_logprobs" by default).
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from awareness_vllm.serving.connector.scheduler import MIN_COMPUTED

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.v1.sample.logits_processor import RequestLogitsProcessor

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines follow one another in this process

KEY = "forced"
Prompt = tuple[dict[str, Any], dict[str, Any]]
"""A prompt for `LLM.generate`, and its `extra_args`."""


class Forced(AdapterLogitsProcessor):
    """A logits processor that forces the ids in a request's `extra_args["forced"]`, in order."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        ids = (params.extra_args or {}).get(KEY)
        if ids is None:
            return None

        def force(output_ids: list[int], logits: Tensor) -> Tensor:
            forced = torch.full_like(logits, -torch.inf)
            forced[ids[len(output_ids)]] = 0.0
            return forced

        return force


@contextlib.contextmanager
def engine(model: Path, **args: Any) -> Iterator[LLM]:
    """vLLM's offline engine for scoring, shut down afterwards, so that another can follow."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(model),
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        max_logprobs=-1,
        disable_log_stats=True,
        logits_processors=[Forced],
        **args,
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scored(
    llm: LLM, prompts: Sequence[Prompt], ids: Sequence[list[int]], *, loaded: bool
) -> list[Tensor]:
    """Log probabilities [T, V] of the ids [T] after each prompt.

    Args:
        loaded: whether the prompts are memories and one id; then it is checked that they were
            loaded.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=len(forced),
            logprobs=-1,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            temperature=0,
            extra_args={**extra, KEY: forced},
        )
        for (_, extra), forced in zip(prompts, ids, strict=True)
    ]
    outputs = llm.generate([prompt for prompt, _ in prompts], params, use_tqdm=False)
    rows = []
    for output, forced in zip(outputs, ids, strict=True):
        (one,) = output.outputs
        assert list(one.token_ids) == forced, "other tokens came than were forced"
        read = len(output.prompt_token_ids) - output.num_cached_tokens
        assert not loaded or read == MIN_COMPUTED, f"{read} tokens of a memory's prompt were read"
        rows.append(dense(one.logprobs, len(forced)))
    return rows


def dense(flat: Any, count: int) -> Tensor:
    """vLLM's flat log probabilities as [T, V]; each position lists the generated token, then all by
    rank."""
    tokens, logprobs = torch.tensor(flat.token_ids), torch.tensor(flat.logprobs)
    rows = tokens.view(count, -1), logprobs.view(count, -1)
    return torch.empty(count, rows[0].shape[1] - 1).scatter_(1, *rows)
