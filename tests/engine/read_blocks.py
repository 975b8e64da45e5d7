"""Load a memory into an offline engine with the hybrid allocator on, and read its blocks back.

Run as a script, since an engine wants a process of its own: MODEL PACKAGE OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from awareness_vllm.packages.file import read_tokens
from awareness_vllm.serving.config import ServingConfig, transfer_config
from awareness_vllm.serving.params import LoadParams, Part, kv_transfer_params
from awareness_vllm.serving.readback import CAPTURE_KEY


def main(model: str, package: str, out: str) -> None:
    ids = read_tokens(Path(package))
    params = LoadParams(parts=(Part(memory=Path(package).stem, tokens=len(ids)),))
    config = ServingConfig(store=str(Path(package).parent), capture=True)
    engine = LLM(
        model=model,
        max_model_len=len(ids) + 64,
        max_num_batched_tokens=len(ids) + 64,
        max_num_seqs=1,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        kv_transfer_config=transfer_config(config),
    )
    engine.generate(
        {"prompt_token_ids": ids + ids[1:17], "cache_salt": params.cache_salt},
        SamplingParams(
            max_tokens=1,
            extra_args={"kv_transfer_params": kv_transfer_params(params, {CAPTURE_KEY: out})},
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
