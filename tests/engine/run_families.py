"""Tiny models of families, one engine after another in this process: each captures a text, answers
after it natively, and answers after its own memory.

Run as a script: OUT FAMILY …; for each family a line of JSON is added to OUT.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a process more would cost as much as an engine

from families import SAID, save
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.capture import read_tokens
from awareness_vllm.packages.file import publish
from awareness_vllm.serving.connector.capture_queue import capture_to
from awareness_vllm.serving.offline import OfflineMemories
from awareness_vllm.serving.offline_capture import as_package

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom; " * 4
QUESTION = "What was it, then? It was"
LENGTH, BLOCK = 512, 32
"""LENGTH is beyond what the stretched models were trained for."""


def run(family: str, scratch: Path) -> dict[str, Any]:
    started = time.perf_counter()
    folder = save(family, scratch / "model")
    memories = OfflineMemories(folder, scratch / "store")
    engine = LLM(
        model=str(folder),
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH,
        max_num_seqs=2,
        block_size=BLOCK,
        enforce_eager=True,
        kv_cache_memory_bytes=2**24,
        disable_log_stats=True,
        **memories.engine_args,
    )
    memories.attach(engine)
    tokens = read_tokens(folder, TEXT)
    states = scratch / "states.safetensors"
    engine.generate(
        {"prompt_token_ids": tokens.ids},
        SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": capture_to(states)}),
        use_tqdm=False,
    )
    package = as_package(memories.resolver.model.geometry, TEXT, tokens, load_file(states), None)
    memory = publish(package, scratch / "store").stem
    question = tokenize(load_tokenizer(str(folder)), QUESTION).ids
    prompt, extra_args = memories.prompt(QUESTION, [memory])
    assert prompt["prompt_token_ids"] == [*tokens.ids, *question]
    native = {**prompt, "cache_salt": "native"}  # nothing of it is cached
    said = {}
    for arm, one, extra in (("native", native, {}), ("memory", prompt, extra_args)):
        asked = SamplingParams(max_tokens=SAID, temperature=0, ignore_eos=True, extra_args=extra)
        (output,) = engine.generate(one, asked, use_tqdm=False)
        said[arm] = {"ids": list(output.outputs[0].token_ids), "cached": output.num_cached_tokens}
    engine.llm_engine.engine_core.shutdown()
    return {"tokens": len(tokens.ids), **said, "seconds": time.perf_counter() - started}


def main(out: Path, families: list[str]) -> None:
    for family in families:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found = run(family, Path(scratch))
            except Exception:  # the others are still to be tried
                found = {"error": traceback.format_exc()}
        gc.collect()
        cleanup_dist_env_and_memory()
        with out.open("a") as file:
            file.write(json.dumps({"family": family, **found}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
