"""Load a memory into an offline engine with the hybrid allocator on, and read its blocks back.

Run as a script, one engine after another in this process: MODEL PACKAGE OUT …
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process more would cost as much as an engine

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.serving.connector.capture_queue import capture_to
from awareness_vllm.serving.offline import OfflineMemories

QUESTION = " In a few words, the text above says that there was a"


def read_back(model: str, package: Path, out: str) -> None:
    room = read_manifest(package).tokens + 64
    memories = OfflineMemories(model, package.parent)
    engine = LLM(
        model=model,
        max_model_len=room,
        max_num_batched_tokens=room,
        max_num_seqs=1,
        enforce_eager=True,
        kv_cache_memory_bytes=2**28,
        **memories.engine_args,
    )
    memories.attach(engine)
    prompt, extra_args = memories.prompt(QUESTION, [package.stem])
    extra_args["kv_transfer_params"] |= capture_to(out)
    engine.generate(prompt, SamplingParams(max_tokens=1, extra_args=extra_args))
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    for at in range(1, len(sys.argv), 3):
        read_back(sys.argv[at], Path(sys.argv[at + 1]), sys.argv[at + 2])
        gc.collect()
        cleanup_dist_env_and_memory()
