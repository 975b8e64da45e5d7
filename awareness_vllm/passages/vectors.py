"""Embeddings of words, read from a model's folder row by row: no model and no table is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from awareness_vllm.models.folder import INDEX
from awareness_vllm.models.tokens import load_tokenizer
from awareness_vllm.passages.words import Vectors, WordVectors

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""How the names of token embeddings end: Llama and most others, GPT-2, Falcon, GPT-NeoX."""


def word_vectors(folder: str | Path) -> WordVectors | None:
    """The lookup of words by a model: means of the input embeddings of a word's tokens, [N, E].

    None where the folder has no such table that can be read, as of GGUF or quantized weights.
    """
    found = _table(Path(folder))
    if found is None:
        return None
    path, name = found
    rows = safe_open(path, "pt").get_slice(name)
    if len(rows.get_shape()) != 2 or rows.get_dtype() not in ("F32", "F16", "BF16"):
        return None
    tokenizer = load_tokenizer(str(folder))

    def vectors(words: Sequence[str]) -> Vectors:
        encoded = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
        means = [
            np.mean([rows[i : i + 1][0].float().numpy() for i in encoding.ids], axis=0)
            for encoding in encoded
        ]
        return np.stack(means)

    return vectors


def _table(folder: Path) -> tuple[Path, str] | None:
    """The file of the token embeddings, and their name in it."""
    try:
        if (folder / INDEX).is_file():
            files = json.loads((folder / INDEX).read_text())["weight_map"]
        else:
            with safe_open(folder / "model.safetensors", "pt") as file:
                files = dict.fromkeys(file.keys(), "model.safetensors")
    except (OSError, SafetensorError, ValueError, KeyError):
        return None
    return next(((folder / files[name], name) for name in files if name.endswith(TABLES)), None)
