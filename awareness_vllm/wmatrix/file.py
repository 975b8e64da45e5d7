"""The `.wmatrix` file: one learned map and its manifest, in safetensors."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.errors import AwarenessError, BadInput, PackageCorrupt
from awareness_vllm.files import atomic_write, wmatrices_dir
from awareness_vllm.kernels import LARGEST, decode, encode, largest
from awareness_vllm.models.rope import unrotate
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.file import check_finite, payload_digest
from awareness_vllm.packages.manifest import METADATA_KEY
from awareness_vllm.tensor_file import FileRefused, read_file
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.int8 import dequantized, quantized
from awareness_vllm.wmatrix.manifest import (
    PRODUCTS,
    TensorDigest,
    WMatrixManifest,
    current_name,
    parse_manifest,
    refusing,
    tensors_digest,
)
from awareness_vllm.wmatrix.versions import push_version

MAX_STANDARDISED = 100.0
"""Standard deviations by which a feature may lie off its mean: genuine ones stay below 13."""
MAX_STATE = LARGEST / 4
"""Magnitude of a mapped state: rotated and scaled by positions it stays within LARGEST."""
REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class WMatrix:
    """The learned map from features [F] to position-free target states [O].

    Features are standardised, `(x - mean) * scale` with `scale` the inverse of their standard
    deviations, then go through `encode` [F, R], `decode` [R, O] and `bias` [O]. Sinks are the
    target's states per layer [S, H, D], as cached; `position_embeddings` [P, E] are by side.
    """

    manifest: WMatrixManifest
    mean: Tensor
    scale: Tensor
    encode: Tensor
    decode: Tensor
    bias: Tensor
    sink_keys: list[Tensor]
    sink_values: list[Tensor]
    position_embeddings: dict[str, Tensor] = field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """Share of the target states' variance that the map explains on held-out documents, None
        where not measured."""
        parts = self.manifest.r2.values()
        return sum(parts) / len(parts) if parts else None

    @property
    def reconstruction_error(self) -> float | None:
        """Share of the features' variance that a round trip through the latent loses."""
        return self.manifest.reconstruction_error

    @property
    def payload(self) -> str:
        """sha256, in hex, of manifest and tensors: the identity of this map, saved or not."""
        return payload_digest(self.manifest.model_dump_json(), sorted(self._tensors().items()))

    @property
    def tensors_digest(self) -> str:
        """sha256, in hex, of the tensors, as the file has them."""
        return tensors_digest(
            {
                name: TensorDigest(
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(tensor.shape),
                    hashlib.sha256(
                        tensor.contiguous().view(-1).view(torch.uint8).numpy().data
                    ).hexdigest(),
                )
                for name, tensor in self._tensors().items()
            }
        )

    def register(self, name: str, registry: str | Path | None = None) -> Path:
        """Save under a name in `$AWARENESS_HOME/wmatrices`; the file's path.

        Args:
            registry: also push it there, as the newest version of the name: the tag `name` is that
                of the newest, `name.v1`, `name.v2` and so on stay.

        Raises:
            BadInput: not a name, or no registry. RegistryDenied, RegistryError: it is saved, but
                not pushed.
        """
        if not REGISTERED.fullmatch(name):
            raise BadInput("not a W-Matrix name", found=repr(name), expected=REGISTERED.pattern)
        path = wmatrices_dir() / f"{name}.wmatrix"
        repository = None if registry is None else open_repository(registry)
        self.save(path)
        if repository is not None:
            push_version(path, name, repository)
        return path

    def map(
        self, source: Tensor | None, embeddings: Tensor, masked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The target's states of each token, keys position-free.

        Args: as of `latent`.

        Returns:
            keys and values per target layer, [T, H, D] float32.

        Raises:
            PackageCorrupt: states that no model computes, further than MAX_STANDARDISED off, or
                that become such.
        """
        latent = self.latent(source, embeddings, masked)
        base = self.base_states(source, masked, len(latent)) if self.manifest.residual else None
        return self.states(latent, base)

    def latent(
        self, source: Tensor | None, embeddings: Tensor, masked: Tensor | None = None
    ) -> Tensor:
        """The latent [T, R] of each token, of the dtype of `encode`.

        Args:
            source: [T, source_width] float32 at the aligned source tokens; None masks all of them.
            embeddings: [T, embedding_width] float32, tokens' embeddings, then position embeddings.
            masked: [T] bool, rows whose source states are masked: replaced by their mean.

        Raises:
            PackageCorrupt: states that no model computes, further than MAX_STANDARDISED off.
        """
        width = self.manifest.source_width
        features = torch.zeros(len(embeddings), len(self.mean), dtype=self.encode.dtype)
        if source is not None:
            scale = self.scale[:width]
            features[:, :width] = torch.addcmul(-self.mean[:width] * scale, source, scale)
        if masked is not None:
            features[masked.nonzero()[:, 0], :width] = 0
        check_plausible(features[:, :width])
        features[:, width:] = (embeddings - self.mean[width:]) * self.scale[width:]
        return encode(features, self.encode)

    def states(
        self, latent: Tensor, base: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The target's states of a latent [T, R], as `map` gives them, added to `base` where the
        map is a residual one. Raises PackageCorrupt."""
        flat = decode(latent, self.decode, self.bias)
        if base is not None:
            flat += base
        check_states(flat)
        return split_states(self.manifest.target, flat)

    @functools.cached_property
    def reach(self) -> Tensor:
        """The magnitude [R] float32 that no latent exceeds whose features all lie within a standard
        deviation of their means."""
        reach = self.encode.float().abs().sum(0)
        return reach.clamp_min(torch.finfo(torch.float32).tiny)

    def base_states(self, source: Tensor | None, masked: Tensor | None, rows: int) -> Tensor:
        """The states [rows, source_width] that a residual map adds to: the source's, or their mean
        where masked."""
        mean = self.mean[: self.manifest.source_width]
        if source is None:
            return mean.expand(rows, -1)
        return source if masked is None else torch.where(masked[:, None], mean, source)

    def to(self, device: torch.device | str) -> WMatrix:
        """The map with its tensors on a device."""
        return WMatrix(
            self.manifest,
            **{n: getattr(self, n).to(device) for n in ("mean", "scale", *PRODUCTS, "bias")},
            sink_keys=[state.to(device) for state in self.sink_keys],
            sink_values=[state.to(device) for state in self.sink_values],
            position_embeddings={s: t.to(device) for s, t in self.position_embeddings.items()},
        )

    def position_latents(self) -> dict[str, Tensor]:
        """The share of each position in the latent, [P, R] by side: the map is linear."""
        latents, end = {}, self.manifest.source_width + self.manifest.token_width
        for side, table in sorted(self.position_embeddings.items()):
            part = slice(end, end := end + table.shape[1])
            rows = (table - self.mean[part]) * self.scale[part]
            latents[side] = rows.to(self.encode.dtype) @ self.encode[part]
        return latents

    def to_int8(self) -> WMatrix:
        """The map with `encode` and `decode` rounded to int8, which its file stores.

        It is not certified: a certificate states what other weights were measured to keep.
        """
        update = {"quantization": "int8", "certificate": None, "payload": ""}
        rounded = dequantized(quantized({"encode": self.encode, "decode": self.decode}))
        return replace(
            self,
            manifest=self.manifest.model_copy(update=update),
            encode=rounded["encode"],
            decode=rounded["decode"],
        )

    def save(self, path: str | Path) -> None:
        """Write the file atomically, with the payload digest in its manifest."""
        path = Path(path)
        manifest = self.manifest.model_copy(update={"payload": self.payload})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            save_file(self._tensors(), draft, {METADATA_KEY: manifest.model_dump_json()})

    def _tensors(self) -> dict[str, Tensor]:
        """The file's tensors by name."""
        products = {"encode": self.encode.contiguous(), "decode": self.decode.contiguous()}
        if self.manifest.quantization:
            products = quantized(products)
        tensors = {"mean": self.mean, "scale": self.scale, "bias": self.bias, **products}
        for i, (key, value) in enumerate(zip(self.sink_keys, self.sink_values, strict=True)):
            tensors[f"sink.{i}.key"] = key.contiguous()
            tensors[f"sink.{i}.value"] = value.contiguous()
        return tensors | {
            f"position_embeddings.{side}": table for side, table in self.position_embeddings.items()
        }


def magnitude(x: Tensor) -> float:
    """The largest absolute value; 0 of nothing, not a number where one of them is none."""
    return max(map(abs, map(float, x.aminmax()))) if x.numel() else 0.0


def check_states(states: Tensor) -> None:
    """Check mapped states [T, O], which attention, and another request's masked tokens, will meet.

    Raises:
        PackageCorrupt: a value that is not finite, or that no model computes.
    """
    found = magnitude(states)
    if not found <= MAX_STATE:  # an undefined value compares false
        raise PackageCorrupt(
            "the memory's aligned states are not plausible",
            found=f"a value of {found:.3g}",
            expected=f"at most {MAX_STATE:g}",
            remedy="capture the memory again, or use another W-Matrix",
        )


def check_plausible(features: Tensor) -> None:
    """Check standardised features [T, F]. Raises PackageCorrupt."""
    furthest = magnitude(features)
    if not furthest <= MAX_STANDARDISED:  # an undefined value compares false
        raise PackageCorrupt(
            "the memory's states are not plausible",
            found=f"a state {furthest:.3g} standard deviations off its mean",
            expected=f"at most {MAX_STANDARDISED:g}",
            remedy="capture the memory again",
        )


def load(path: str | Path, *, digest: str | None = None) -> WMatrix:
    """A W-Matrix file, verified; links are followed.

    Args:
        digest: the sha256, in hex, that the file must have.

    Raises:
        WMatrixCorrupt: unreadable, altered, another file, tensors that contradict the manifest, or
            values that are not finite.
    """
    path = Path(path)
    manifests: list[WMatrixManifest] = []
    with refusing(path):
        file = read_file(
            path.resolve(),
            lambda header: manifests.append(parse_manifest(header)),
            digest=digest,
            visit=check_finite,
        )
        (manifest,), tensors = manifests, file.tensors()
        check_positions(manifest)
        if not bool((tensors["scale"] > 0).all()):
            raise FileRefused("a scale of a feature that is not positive")
        check_sinks(tensors)
        payload = payload_digest(file.header.metadata[METADATA_KEY], sorted(tensors.items()))
        if payload != manifest.payload:
            raise FileRefused(f"payload {payload}", manifest.payload)
        if manifest.quantization:
            tensors |= dequantized(tensors)
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    count = len(manifest.target.layers)
    wmatrix = WMatrix(
        manifest,
        **{name: tensors[name] for name in ("mean", "scale", "encode", "decode", "bias")},
        sink_keys=[tensors[f"sink.{i}.key"] for i in range(count)],
        sink_values=[tensors[f"sink.{i}.value"] for i in range(count)],
        position_embeddings={
            side: tensors[f"position_embeddings.{side}"]
            for side in manifest.position_embedding_shapes
        },
    )
    with refusing(path):
        check_map(wmatrix)
    return wmatrix


def check_map(wmatrix: WMatrix) -> None:
    """Check that a map makes plausible states of a token whose source is masked.

    Raises:
        FileRefused
    """
    try:
        wmatrix.map(None, torch.zeros(1, wmatrix.manifest.embedding_width))
    except PackageCorrupt as error:
        raise FileRefused(f"weights that give {error.found}") from error


def check_sinks(tensors: Mapping[str, Tensor]) -> None:
    """Check the sink's states, which go into a cache as they are. Raises FileRefused."""
    for name, states in tensors.items():
        if name.startswith("sink.") and float(states.abs().max()) > largest(states.dtype):
            raise FileRefused(f"{name} with a state beyond {largest(states.dtype):g}")


def check_positions(manifest: WMatrixManifest) -> None:
    """Check that the positions of both sides are ones that keys can be rotated by.

    Raises:
        FileRefused: an unknown scheme, or rotations that are not finite.
    """
    for side in (manifest.source, manifest.target):
        for layer in dict.fromkeys((layer.head_dim, layer.positions) for layer in side.layers):
            head_dim, positions = layer
            try:
                free = unrotate(torch.ones(1, 1, head_dim), torch.tensor([1]), positions)
            except (AwarenessError, ArithmeticError, ValueError, RuntimeError) as error:
                raise FileRefused(f"positions of {side.name}: {error}"[:300]) from error
            if not free.isfinite().all():
                raise FileRefused(f"rotations of {side.name} that are not finite")
