"""What a model's KV cache looks like: layers, heads, positions of each layer, and whose it is."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from awareness_vllm.errors import UnsupportedModel

SAMPLE_BYTES = 4096


class Strict(BaseModel):
    """Base of every manifest: frozen, and unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Positions(Strict):
    """One layer's positional encoding. `scheme` names a function of `awareness_vllm.positions`."""

    scheme: str
    theta: float | None = None
    rotary_dim: int | None = None


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
    def from_folder(cls, folder: str | Path) -> Geometry:
        """Read a Hugging Face model folder (a name is resolved in the local hub cache).

        Raises:
            UnsupportedModel: the folder, its config or its cache cannot be used.
        """
        return _from_folder(str(resolve_folder(folder)))


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model given by path or by hub name (never downloads)."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
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
def _from_folder(folder: str) -> Geometry:
    path = Path(folder)
    config = json.loads((path / "config.json").read_text())
    return from_config(
        config,
        name=path.name,
        weights=weights_fingerprint(path),
        tokenizer=file_digest(path / "tokenizer.json"),
    )


def from_config(config: dict[str, Any], *, name: str, weights: str, tokenizer: str) -> Geometry:
    """Geometry from the fields of a `config.json`.

    Raises:
        UnsupportedModel: multi-head latent attention, recurrent state, or unknown positions.
    """
    config = {**config, **config.get("text_config", {})}
    for field, why in (
        ("kv_lora_rank", "multi-head latent attention keeps no per-head keys"),
        ("ssm_state_size", "a recurrent state is not a KV cache"),
    ):
        if config.get(field):
            raise UnsupportedModel(
                f"{name}: {why}", found=f"{field}={config[field]}", expected="dense attention KV"
            )
    count = _field(config, name, "num_hidden_layers")
    attention_heads = _field(config, name, "num_attention_heads")
    hidden = _field(config, name, "hidden_size")
    heads = config.get("num_key_value_heads") or attention_heads
    head_dim = config.get("head_dim") or hidden // attention_heads
    types = config.get("layer_types") or ["full_attention"] * count
    layers = tuple(
        LayerGeometry(
            heads=heads,
            head_dim=head_dim,
            positions=_positions(config, name, kind, head_dim),
            window=config.get("sliding_window") if kind == "sliding_attention" else None,
        )
        for kind in types
    )
    return Geometry(
        name=name,
        model_type=_field(config, name, "model_type"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        hidden_size=hidden,
        vocab_size=_field(config, name, "vocab_size"),
        max_positions=_field(config, name, "max_position_embeddings"),
        layers=layers,
        weights=weights,
        tokenizer=tokenizer,
    )


def _field(config: dict[str, Any], name: str, field: str) -> Any:
    if config.get(field) is None:
        raise UnsupportedModel(f"{name}: config.json lacks a field", expected=field)
    return config[field]


def _positions(config: dict[str, Any], name: str, kind: str, head_dim: int) -> Positions:
    """The rotary parameters of one layer type; `rope_parameters` is flat or nested by type."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get(kind, rope)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    theta = rope.get("rope_theta") or config.get("rope_theta")
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if theta is None or rope_type != "default":
        raise UnsupportedModel(
            f"{name}: positions of {kind} layers are not supported",
            found=f"rope_type={rope_type!r}, rope_theta={theta}",
            expected="rope_type 'default' with a rope_theta",
        )
    return Positions(scheme="rope", theta=float(theta), rotary_dim=int(head_dim * partial))


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
