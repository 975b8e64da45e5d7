"""The geometry and fingerprints of a model folder, from its config, weights and tokenizer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.files import atomic_write, file_digest, geometries_dir
from awareness_vllm.models.folder import (
    read_json,
    resolve_folder,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from awareness_vllm.models.geometry import Geometry

READERS = ("geometry.py", "describe.py", "families.py")
"""The modules that interpret a config: cached geometries depend on their code."""
DTYPES = frozenset({"bfloat16", "float16", "float32", "float64"})
"""Dtypes that a model's states can have."""


def geometry_of(folder: str | Path, tokens: int | None = None) -> Geometry:
    """The geometry of a Hugging Face model, by folder or by name in the local hub cache.

    Args:
        tokens: the longest sequence, by which LongRoPE chooses its factors: a text's length for
            transformers, a server's `--max-model-len`; the short factors by default.

    Raises:
        UnsupportedModel: no such model, or a config or cache that cannot be described.
    """
    return _from_folder(str(resolve_folder(folder)), tokens)


@functools.lru_cache(maxsize=32)
def _from_folder(folder: str, tokens: int | None) -> Geometry:
    path = Path(folder)
    geometry = _from_config(path / "config.json", path.name, tokens)
    weights, tokenizer = _fingerprints(path)
    identity = {"name": path.name, "weights": weights, "tokenizer": tokenizer}
    return geometry.model_copy(update=identity)


@functools.lru_cache(maxsize=32)
def _fingerprints(folder: Path) -> tuple[str, str]:
    return weights_fingerprint(folder), tokenizer_fingerprint(folder)


def _from_config(config: Path, name: str, tokens: int | None) -> Geometry:
    """The geometry of a `config.json`, without fingerprints. It is cached in a file: transformers,
    which reads configs, takes seconds to import."""
    document = read_json(config)
    path = _cache_file(config, tokens)
    with contextlib.suppress(OSError, ValidationError):  # not cached yet, or damaged
        return Geometry.model_validate_json(path.read_bytes())
    geometry = from_config(document, name=name, weights="", tokenizer="", tokens=tokens)
    with contextlib.suppress(OSError):  # a read-only home: the config is read again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            draft.write_text(geometry.model_dump_json())
    return geometry


def _cache_file(config: Path, tokens: int | None) -> Path:
    """The cache's file, named by a digest of all that a geometry depends on: the config, the
    tokens, and the code that reads it, here and in transformers."""
    code = [Path(__file__).with_name(module) for module in READERS]
    version = importlib.metadata.version("transformers")
    parts = [*map(file_digest, (config, *code)), version, str(tokens)]
    return geometries_dir() / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.json"


def from_config(
    config: dict[str, Any], *, name: str, weights: str, tokenizer: str, tokens: int | None = None
) -> Geometry:
    """The geometry of a parsed `config.json`; `tokens` as in `geometry_of`.

    Raises:
        UnsupportedModel: no dense attention KV, or an unknown positional encoding.
    """
    text = config.get("text_config") or {}
    if not isinstance(text, dict):
        raise UnsupportedModel(
            f"{name}: config.json cannot be used", found=f"text_config: {text!r}", expected="fields"
        )
    raw = {**config, **text}
    raw.pop("text_config", None)
    from awareness_vllm.models.families import read

    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise UnsupportedModel(f"{name}: unsupported dtype", found=dtype, expected=sorted(DTYPES))
    try:
        fields = read(raw, name, tokens)
        return Geometry(name=name, dtype=dtype, weights=weights, tokenizer=tokenizer, **fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UnsupportedModel(
            f"{name}: config.json has a value of the wrong kind", found=error
        ) from error
