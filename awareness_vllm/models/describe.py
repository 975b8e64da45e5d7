"""A model folder's geometry and fingerprints, from its config, weights and tokenizer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import struct
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.files import file_digest, geometries_dir, write_whole
from awareness_vllm.models.geometry import Geometry

SAMPLE_BYTES = 4096
READERS = ("geometry.py", "describe.py", "families.py")
"""The modules that decide what a config means."""


def is_model_folder(model: str | Path) -> bool:
    """Whether this is a model's folder, and not a name; any text may be asked about."""
    try:
        return (Path(model).expanduser() / "config.json").is_file()
    except (OSError, RuntimeError):  # too long for a path; "~" of somebody that is not there
        return False


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model given by path or by hub name (never downloads)."""
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
    """The geometry of a Hugging Face model folder (a name is resolved in the local hub cache).

    Args:
        tokens: the most that are read at once, by which LongRoPE chooses its factors: a text's
            length for transformers, a server's `--max-model-len`. By default, few.

    Raises:
        UnsupportedModel: the folder, its config or its cache cannot be used.
    """
    return _from_folder(str(resolve_folder(folder)), tokens)


@functools.lru_cache(maxsize=32)
def _from_folder(folder: str, tokens: int | None) -> Geometry:
    path = Path(folder)
    weights, tokenizer = _fingerprints(path)
    found = _from_config((path / "config.json").read_bytes(), path.name, tokens)
    whose = {"name": path.name, "weights": weights, "tokenizer": tokenizer}
    return found.model_copy(update=whose)


@functools.lru_cache(maxsize=32)
def _fingerprints(folder: Path) -> tuple[str, str]:
    return weights_fingerprint(folder), file_digest(folder / "tokenizer.json")


def _from_config(config: bytes, name: str, tokens: int | None) -> Geometry:
    """What a `config.json` says, of no weights and no tokenizer. It is kept in a file:
    transformers, which reads configs, takes seconds to import."""
    path = _kept(config, tokens)
    with contextlib.suppress(OSError, ValidationError):  # not there yet, or damaged
        return Geometry.model_validate_json(path.read_bytes())
    found = from_config(json.loads(config), name=name, weights="", tokenizer="", tokens=tokens)
    with contextlib.suppress(OSError):  # a home that cannot be written to: read again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, found.model_dump_json())
    return found


def _kept(config: bytes, tokens: int | None) -> Path:
    """Where that is kept, under a digest of all that it depends on: the config, the tokens, and the
    code that reads it, here and in transformers."""
    code = [
        Path(__file__).with_name(module) for module in ("geometry.py", "describe.py", "families.py")
    ]
    version = importlib.metadata.version("transformers")
    parts = [hashlib.sha256(config).hexdigest(), *map(file_digest, code), version, str(tokens)]
    return geometries_dir() / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.json"


def from_config(
    config: dict[str, Any], *, name: str, weights: str, tokenizer: str, tokens: int | None = None
) -> Geometry:
    """Geometry from the fields of a `config.json`; `tokens` as in `geometry_of`.

    Raises:
        UnsupportedModel: no dense attention KV, or positions that nobody here knows.
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
    """sha256 over every safetensors header and a sample from each tensor of a model folder.

    A sample, because hashing a 70B model takes minutes; from each tensor, because a fine-tune may
    touch few of them. It tells models apart; it does not defend against forgery.
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
