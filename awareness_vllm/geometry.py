"""What a model's KV cache looks like: layers, heads, positions of each layer, and whose it is."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.files import write_whole
from awareness_vllm.home import geometries_dir

SAMPLE_BYTES = 4096


class Strict(BaseModel):
    """Base of every manifest: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Positions(Strict):
    """One layer's positional encoding: what is needed to rebuild its tables, and nothing else.

    `scheme` names a function of `awareness_vllm.positions`; which of the other fields it reads is
    said there. Fields at their default are left out of manifests, as they were before they existed.
    """

    scheme: str
    theta: float | None = None
    rotary_dim: int | None = None
    woven: bool = False
    """Whether the two dims of a turned pair stand side by side (GPT-J) or half a turn apart."""
    scale: float | None = None
    """What cosines and sines are multiplied by: YaRN's mscale, LongRoPE's attention factor."""
    factor: float | None = None
    original: int | None = None
    """The positions that the model was trained for, before its context was stretched."""
    length: int | None = None
    """The sequence length that a table of the dynamic scheme was made for."""
    slow: float | None = None
    fast: float | None = None
    """Pairs that turn less than `slow` times within `original` positions are stretched, those that
    turn more than `fast` times are not, and between them goes a ramp."""
    truncate: bool = True
    factors: tuple[float, ...] | None = None
    """LongRoPE's, one for each pair: the short ones or the long ones, whichever were in use."""

    @property
    def additive(self) -> bool:
        """Whether positions were added to the embeddings (learned: GPT-2, OPT). Keys and values of
        all layers hold them then, and no operation on the keys moves such a state."""
        return self.scheme == "learned"

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if v != fields[k].default}


class LayerGeometry(Strict):
    """One layer's cache: `heads` KV heads of `head_dim`, positions, sliding window in tokens."""

    heads: int
    head_dim: int
    positions: Positions
    window: int | None = None

    @property
    def width(self) -> int:
        """Elements of one token's key (or value): `heads * head_dim`."""
        return self.heads * self.head_dim


class Geometry(Strict):
    """A model's KV cache and identity. `weights`, `tokenizer` are fingerprints, not signatures."""

    name: str
    model_type: str
    dtype: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    layers: tuple[LayerGeometry, ...]
    weights: str
    tokenizer: str

    @property
    def additive(self) -> bool:
        """Whether the states hold their positions themselves, and cannot be moved."""
        return any(layer.positions.additive for layer in self.layers)

    @property
    def key_width(self) -> int:
        """Elements of one token's keys over all layers."""
        return sum(layer.width for layer in self.layers)

    @property
    def width(self) -> int:
        """Elements of one token's keys and values over all layers."""
        return self.width_of(range(len(self.layers)))

    def width_of(self, layers: Iterable[int]) -> int:
        """Elements of one token's keys and values in some layers."""
        return 2 * sum(self.layers[i].width for i in layers)

    def same_model(self, other: Geometry) -> bool:
        """Whether KV of one is KV of the other: same weights, same tokenizer, same cache."""
        return (self.weights, self.tokenizer, self.layers) == (
            other.weights,
            other.tokenizer,
            other.layers,
        )

    def same_shape(self, other: Geometry) -> bool:
        """Whether states of one are states for the other, token by token: variants of one model."""
        return (self.layers, self.tokenizer) == (other.layers, other.tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path, tokens: int | None = None) -> Geometry:
        """Read a Hugging Face model folder (a name is resolved in the local hub cache).

        Args:
            tokens: the most that are read at once, by which LongRoPE chooses its factors: a text's
                length for transformers, a server's `--max-model-len`. By default, few.

        Raises:
            UnsupportedModel: the folder, its config or its cache cannot be used.
        """
        return _from_folder(str(resolve_folder(folder)), tokens)


def by_depth(source: int, target: int) -> list[int]:
    """For each of so many target layers the source layer at the same share of the depth."""
    steps = max(1, target - 1)
    return [round(i * (source - 1) / steps) for i in range(target)]


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
        raise UnsupportedModel(
            f"no model at {str(model)!r}",
            found=f"no config.json there, and not in the local hub cache ({type(error).__name__})",
            expected="a Hugging Face model folder",
            remedy="give a folder with config.json, safetensors and tokenizer.json",
        ) from error


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
    code = [Path(__file__).with_name(module) for module in ("geometry.py", "families.py")]
    version = importlib.metadata.version("transformers")
    parts = [hashlib.sha256(config).hexdigest(), *map(file_digest, code), version, str(tokens)]
    return geometries_dir() / f"{hashlib.sha256(' '.join(parts).encode()).hexdigest()}.json"


def from_config(
    config: dict[str, Any], *, name: str, weights: str, tokenizer: str, tokens: int | None = None
) -> Geometry:
    """Geometry from the fields of a `config.json`; `tokens` as in `Geometry.from_folder`.

    Raises:
        UnsupportedModel: no dense attention KV, or positions that nobody here knows.
    """
    raw = {**config, **(config.get("text_config") or {})}
    raw.pop("text_config", None)
    from awareness_vllm.families import read  # late: it reads configs with transformers

    return Geometry(
        name=name,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        weights=weights,
        tokenizer=tokenizer,
        **read(raw, name, tokens),
    )


def file_digest(path: Path) -> str:
    """sha256 of a whole file, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UnsupportedModel(f"cannot read {path}", found=str(error)) from error


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
