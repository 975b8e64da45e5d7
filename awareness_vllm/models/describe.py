"""The geometry and fingerprints of a model folder, from its config, weights and tokenizer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import struct
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.files import atomic_write, file_digest, geometries_dir
from awareness_vllm.models.geometry import Geometry

SAMPLE_BYTES = 4096
READERS = ("geometry.py", "describe.py", "families.py")
"""The modules that interpret a config: cached geometries depend on their code."""


def is_model_folder(model: str | Path) -> bool:
    """Whether any text is the path of a model folder, and not a model's name."""
    try:
        return (Path(model).expanduser() / "config.json").is_file()
    except (OSError, RuntimeError):  # too long for a path, or "~" of an unknown user
        return False


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model, by path or by hub name; nothing is downloaded.

    Raises:
        UnsupportedModel: neither a model folder nor in the local hub cache.
    """
    if is_model_folder(model):
        return Path(model).expanduser().resolve()
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception as error:
        if str(model).casefold().startswith(CLOSED):
            raise closed_model(str(model)) from error
        raise UnsupportedModel(
            f"no model at {str(model)!r}",
            found=f"no config.json there, and not in the local hub cache ({type(error).__name__})",
            expected="a Hugging Face model folder",
            remedy="give a folder with config.json, safetensors and tokenizer.json",
        ) from error


CLOSED = ("gpt-3", "gpt-4", "gpt-5", "chatgpt", "claude", "gemini")
"""How names of models begin that are served through an API only."""


def closed_model(name: str) -> UnsupportedModel:
    """The error about a model of which nobody outside can read weights or KV states."""
    return UnsupportedModel(
        f"{name} is a closed model: its weights and KV states cannot be had",
        found="a model that is served through an API only",
        expected="open models, as local Hugging Face folders",
        remedy="give the folders of open models; of closed ones MemoryCompatibilityChecker and "
        "`awareness check` show published figures (priors)",
    )


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
    weights, tokenizer = _fingerprints(path)
    geometry = _from_config((path / "config.json").read_bytes(), path.name, tokens)
    identity = {"name": path.name, "weights": weights, "tokenizer": tokenizer}
    return geometry.model_copy(update=identity)


@functools.lru_cache(maxsize=32)
def _fingerprints(folder: Path) -> tuple[str, str]:
    return weights_fingerprint(folder), file_digest(folder / "tokenizer.json")


def _from_config(config: bytes, name: str, tokens: int | None) -> Geometry:
    """The geometry of a `config.json`, without fingerprints. It is cached in a file: transformers,
    which reads configs, takes seconds to import."""
    path = _cache_file(config, tokens)
    with contextlib.suppress(OSError, ValidationError):  # not cached yet, or damaged
        return Geometry.model_validate_json(path.read_bytes())
    geometry = from_config(json.loads(config), name=name, weights="", tokenizer="", tokens=tokens)
    with contextlib.suppress(OSError):  # a read-only home: the config is read again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            draft.write_text(geometry.model_dump_json())
    return geometry


def _cache_file(config: bytes, tokens: int | None) -> Path:
    """The cache's file, named by a digest of all that a geometry depends on: the config, the
    tokens, and the code that reads it, here and in transformers."""
    code = [Path(__file__).with_name(module) for module in READERS]
    version = importlib.metadata.version("transformers")
    parts = [hashlib.sha256(config).hexdigest(), *map(file_digest, code), version, str(tokens)]
    return geometries_dir() / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.json"


def from_config(
    config: dict[str, Any], *, name: str, weights: str, tokenizer: str, tokens: int | None = None
) -> Geometry:
    """The geometry of a parsed `config.json`; `tokens` as in `geometry_of`.

    Raises:
        UnsupportedModel: no dense attention KV, or an unknown positional encoding.
    """
    raw = {**config, **(config.get("text_config") or {})}
    raw.pop("text_config", None)
    from awareness_vllm.models.families import read

    return Geometry(
        name=name,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        weights=weights,
        tokenizer=tokenizer,
        **read(raw, name, tokens),
    )


def weights_fingerprint(folder: Path) -> str:
    """sha256, in hex, of every safetensors header and a sample of each tensor of a model folder.

    A sample, because hashing a 70B model takes minutes; of each tensor, because a fine-tune may
    change few of them. It tells models apart; it does not defend against forgery.

    Raises:
        UnsupportedModel: no safetensors files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(f"no safetensors weights in {folder}", expected="*.safetensors")
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            digest.update(json.dumps(header, sort_keys=True).encode())
            for tensor in sorted(header):
                begin, end = header[tensor]["data_offsets"]
                file.seek(8 + size + max(begin, (begin + end - SAMPLE_BYTES) // 2))
                digest.update(file.read(min(SAMPLE_BYTES, end - begin)))
    return digest.hexdigest()
