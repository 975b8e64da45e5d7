"""Load a memory into an offline engine with the hybrid allocator on, and read its blocks back.

Run as a script, since an engine wants a process of its own: MODEL PACKAGE OUT.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from awareness_vllm.packages.file import read_tokens
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.offline import OfflineMemories

QUESTION = " In a few words, the text above says that there was a"


def main(model: str, package: str, out: str) -> None:
    room = len(read_tokens(Path(package))) + 64
    memories = OfflineMemories(model, Path(package).parent, capture=True)
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
    prompt, extra_args = memories.prompt(QUESTION, [Path(package).stem])
    extra_args["kv_transfer_params"][CAPTURE_KEY] = out
    engine.generate(prompt, SamplingParams(max_tokens=1, extra_args=extra_args))


if __name__ == "__main__":
    main(*sys.argv[1:])
