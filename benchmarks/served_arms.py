"""The five arms through vLLM: packages in a store, a map in a file, memories loaded as served."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from forced import Prompt, engine, scored
from torch import Tensor

from awareness_vllm.evaluate.conditions import CONDITIONS, EvalHarness
from awareness_vllm.evaluate.evaluate import Excerpt, TextFigures, pair_indices, text_metrics
from awareness_vllm.packages.file import publish
from awareness_vllm.serving.offline import OfflineMemories
from awareness_vllm.wmatrix.file import WMatrix

PATIENCE = 86_400.0
"""Seconds: a late memory would be read natively."""


def served_texts(harness: EvalHarness, excerpts: Sequence[Excerpt], **args: Any) -> TextFigures:
    """The figures of `evaluate_texts`, with vLLM instead of transformers, on the same excerpts.

    Packages are captured with transformers, which keeps all states. The target is vLLM's, in its
    own data type. It reads the last seven tokens of a memory itself, as always before a prompt of
    one (`MIN_COMPUTED`); there is no tail beyond these.

    Args:
        harness: with a map.
        args: arguments of vLLM's engine.
    """
    assert harness.wmatrix
    sink, read = harness.sink(), [harness.ids(text) for _, text, _ in excerpts]
    natively = {"native": read, "none": [ids[:sink] for ids in read]}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        memories = [publish(harness.package(text), store).stem for _, text, _ in excerpts]
        loaded = {
            "memory": memories,
            "wrong_memory": [memories[other] for _, other in sorted(pair_indices(len(excerpts)))],
        }
        conditions = score_excerpts(
            harness, harness.wmatrix, store, excerpts, natively, loaded, args
        )
        tokens = {"tokens_only": memories}
        conditions |= score_excerpts(
            harness, mask_source(harness.wmatrix), store, excerpts, {}, tokens, args
        )
    figures = {
        condition: [
            text_metrics(native, logprobs, ids)
            for native, logprobs, (_, _, ids) in zip(
                conditions["native"], conditions[condition], excerpts, strict=True
            )
        ]
        for condition in CONDITIONS
    }
    names = [name for name, _, _ in excerpts]
    return TextFigures(names, {condition: np.array(rows) for condition, rows in figures.items()})


def score_excerpts(
    harness: EvalHarness,
    wmatrix: WMatrix,
    store: Path,
    excerpts: Sequence[Excerpt],
    natively: Mapping[str, list[list[int]]],
    loaded: Mapping[str, list[str]],
    args: dict[str, Any],
) -> dict[str, list[Tensor]]:
    """Log probabilities [T, V] of each excerpt by condition, from one engine with this map.

    Args:
        natively: the ids that a condition reads before each excerpt.
        loaded: the memory that a condition loads before each excerpt.
    """
    wmatrix.save(file := store / "pair.wmatrix")
    offline = OfflineMemories(harness.target, store, [file], tail=0, load_timeout=PATIENCE)
    with engine(harness.target, **offline.engine_args, **args) as llm:
        offline.attach(llm)
        starts = [ids[:1] for _, _, ids in excerpts]
        prompts: dict[str, list[Prompt]] = {
            condition: [
                ({"prompt_token_ids": [*i, *s]}, {}) for i, s in zip(ids, starts, strict=True)
            ]
            for condition, ids in natively.items()
        }
        for condition, ids in loaded.items():
            prompts[condition] = [
                offline.prompt(s, [i], reread=0, quote=0) for i, s in zip(ids, starts, strict=True)
            ]
        scores = [ids[1:] for _, _, ids in excerpts]
        return {
            condition: scored(llm, params, scores, loaded=condition in loaded)
            for condition, params in prompts.items()
        }


def mask_source(wmatrix: WMatrix) -> WMatrix:
    """The map with the source's states masked."""
    encode = wmatrix.encode.clone()
    encode[: wmatrix.manifest.source_width] = 0
    return replace(wmatrix, encode=encode)
