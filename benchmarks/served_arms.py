"""The five arms through vLLM: packages in a store, the map in a file, memories loaded as served."""

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
"""Seconds: a memory that is late would be read natively, and nobody waits here."""


def served_texts(harness: EvalHarness, cuts: Sequence[Excerpt], **args: Any) -> TextFigures:
    """What `evaluate_texts` measures with transformers, on the same cuts.

    Packages are captured with transformers, which keeps all states. The target is vLLM's, in its
    own data type. Of a memory it reads the last seven tokens itself, as always before a prompt of
    one (`MIN_COMPUTED`); of the tail that servers have there is nothing else.

    Args:
        bench: with a map.
        args: vLLM's own.
    """
    assert harness.wmatrix
    sink, read = harness.sink(), [harness.ids(text) for _, text, _ in cuts]
    natively = {"native": read, "none": [ids[:sink] for ids in read]}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        memories = [publish(harness.package(text), store).stem for _, text, _ in cuts]
        loaded = {
            "memory": memories,
            "wrong_memory": [memories[other] for _, other in sorted(pair_indices(len(cuts)))],
        }
        conditions = said(harness, harness.wmatrix, store, cuts, natively, loaded, args)
        tokens = {"tokens_only": memories}
        conditions |= said(harness, masked(harness.wmatrix), store, cuts, {}, tokens, args)
    figures = {
        arm: [
            text_metrics(native, logprobs, ids)
            for native, logprobs, (_, _, ids) in zip(
                conditions["native"], conditions[arm], cuts, strict=True
            )
        ]
        for arm in CONDITIONS
    }
    names = [name for name, _, _ in cuts]
    return TextFigures(names, {arm: np.array(rows) for arm, rows in figures.items()})


def said(
    harness: EvalHarness,
    wmatrix: WMatrix,
    store: Path,
    cuts: Sequence[Excerpt],
    natively: Mapping[str, list[list[int]]],
    loaded: Mapping[str, list[str]],
    args: dict[str, Any],
) -> dict[str, list[Tensor]]:
    """Log probabilities [T, V] of each cut in these arms, from one engine with this map.

    Args:
        natively: what an arm reads before each cut.
        loaded: the memory that an arm loads before each cut.
    """
    wmatrix.save(file := store / "pair.wmatrix")
    offline = OfflineMemories(harness.target, store, [file], tail=0, load_timeout=PATIENCE)
    with engine(harness.target, **offline.engine_args, **args) as llm:
        offline.attach(llm)
        starts = [ids[:1] for _, _, ids in cuts]
        prompts: dict[str, list[Prompt]] = {
            arm: [({"prompt_token_ids": [*i, *s]}, {}) for i, s in zip(ids, starts, strict=True)]
            for arm, ids in natively.items()
        }
        for arm, ids in loaded.items():
            prompts[arm] = [offline.prompt(s, [i]) for i, s in zip(ids, starts, strict=True)]
        scores = [ids[1:] for _, _, ids in cuts]
        return {
            arm: scored(llm, asked, scores, loaded=arm in loaded) for arm, asked in prompts.items()
        }


def masked(wmatrix: WMatrix) -> WMatrix:
    """The map where the source says nothing: what the target's tokens alone give."""
    encode = wmatrix.encode.clone()
    encode[: wmatrix.manifest.source_width] = 0
    return replace(wmatrix, encode=encode)
