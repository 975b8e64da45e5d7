"""Embeddings of words, read from a model's folder row by row: no model and no table is loaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.folder import INDEX, MAX_HEADER
from awareness_vllm.models.tokens import load_tokenizer
from awareness_vllm.passages.words import Vectors, WordVectors

TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""How the names of token embeddings end: Llama and most others, GPT-2, Falcon, GPT-NeoX."""
DTYPES = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


@functools.lru_cache(maxsize=8)
def word_vectors(folder: str | Path) -> WordVectors | None:
    """The lookup of words by a model: means of the input embeddings of a word's tokens, [N, E].

    None where the folder has no such table that can be read, as of GGUF or quantized weights.
    """
    try:
        table = _table(Path(folder))
        tokenizer = load_tokenizer(str(folder))
    except (OSError, ValueError, KeyError, TypeError, UnsupportedModel):
        return None

    def vectors(words: Sequence[str]) -> Vectors:
        encoded = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
        ids = [[i for i in encoding.ids if i < len(table)] or [0] for encoding in encoded]
        sizes = np.array([len(own) for own in ids])
        rows = table[np.concatenate(ids)]
        if table.dtype == np.uint16:  # bfloat16: the upper half of float32
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        sums = np.add.reduceat(rows.astype(np.float32), np.cumsum(sizes) - sizes, axis=0)
        return sums / sizes[:, None]

    return vectors


def _table(folder: Path) -> np.memmap:
    """The token embeddings [V, E], as they lie in their file."""
    path = folder / "model.safetensors"
    if (folder / INDEX).is_file():
        files = json.loads((folder / INDEX).read_text())["weight_map"]
        path = folder / next((files[name] for name in files if name.endswith(TABLES)), "")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(size))
    tensor = next((header[name] for name in header if name.endswith(TABLES)), None)
    if tensor is None or len(tensor["shape"]) != 2:
        raise ValueError(f"{path} has no token embeddings")
    offset = 8 + size + tensor["data_offsets"][0]
    return np.memmap(path, DTYPES[tensor["dtype"]], "r", offset, tuple(tensor["shape"]))
