"""The `.wmatrix` file: one learned map and its manifest, in safetensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.errors import BadInput
from awareness_vllm.files import atomic_write, private_copy, wmatrices_dir
from awareness_vllm.kernels import decode, encode
from awareness_vllm.packages.file import payload_digest
from awareness_vllm.packages.manifest import METADATA_KEY
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.manifest import WMatrixManifest, corrupt_wmatrix, read_manifest

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

    def register(self, name: str) -> Path:
        """Save under a name in `$AWARENESS_HOME/wmatrices`; the file's path. Raises BadInput."""
        if not REGISTERED.fullmatch(name):
            raise BadInput("not a W-Matrix name", found=repr(name), expected=REGISTERED.pattern)
        path = wmatrices_dir() / f"{name}.wmatrix"
        self.save(path)
        return path

    def map(
        self, source: Tensor | None, embeddings: Tensor, masked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The target's states of each token, keys position-free.

        Args:
            source: [T, source_width] float32 at the aligned source tokens; None masks all of them.
            embeddings: [T, embedding_width] float32, tokens' embeddings, then position embeddings.
            masked: [T] bool, rows whose source states are masked: replaced by their mean.

        Returns:
            keys and values per target layer, [T, H, D] float32.
        """
        width = self.manifest.source_width
        features = torch.zeros(len(embeddings), len(self.mean), dtype=self.encode.dtype)
        if source is not None:
            scale = self.scale[:width]
            features[:, :width] = torch.addcmul(-self.mean[:width] * scale, source, scale)
        if masked is not None:
            features[masked.nonzero()[:, 0], :width] = 0
        features[:, width:] = (embeddings - self.mean[width:]) * self.scale[width:]
        flat = decode(encode(features, self.encode), self.decode, self.bias)
        if self.manifest.residual:
            flat += self.base_states(source, masked, len(flat))
        return split_states(self.manifest.target, flat)

    def base_states(self, source: Tensor | None, masked: Tensor | None, rows: int) -> Tensor:
        """The states [rows, source_width] that a residual map adds to: the source's, or their mean
        where masked."""
        mean = self.mean[: self.manifest.source_width]
        if source is None:
            return mean.expand(rows, -1)
        return source if masked is None else torch.where(masked[:, None], mean, source)

    def position_latents(self) -> dict[str, Tensor]:
        """The share of each position in the latent, [P, R] by side: the map is linear."""
        latents, end = {}, self.manifest.source_width + self.manifest.token_width
        for side, table in sorted(self.position_embeddings.items()):
            part = slice(end, end := end + table.shape[1])
            rows = (table - self.mean[part]) * self.scale[part]
            latents[side] = rows.to(self.encode.dtype) @ self.encode[part]
        return latents

    def save(self, path: str | Path) -> None:
        """Write the file atomically, with the payload digest in its manifest."""
        path = Path(path)
        manifest = self.manifest.model_copy(update={"payload": self.payload})
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            save_file(self._tensors(), draft, {METADATA_KEY: manifest.model_dump_json()})

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            "mean": self.mean,
            "scale": self.scale,
            "encode": self.encode.contiguous(),
            "decode": self.decode.contiguous(),
            "bias": self.bias,
        }
        for i, (key, value) in enumerate(zip(self.sink_keys, self.sink_values, strict=True)):
            tensors[f"sink.{i}.key"] = key.contiguous()
            tensors[f"sink.{i}.value"] = value.contiguous()
        return tensors | {
            f"position_embeddings.{side}": table for side, table in self.position_embeddings.items()
        }


def load(path: str | Path) -> WMatrix:
    """A W-Matrix file, verified.

    Raises:
        WMatrixCorrupt: unreadable, altered, or tensors that contradict the manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    source, target = manifest.source, manifest.target
    try:
        with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            document = file.metadata()[METADATA_KEY]
    except (SafetensorError, OSError) as error:
        raise corrupt_wmatrix(path, str(error)) from error
    if (payload := payload_digest(document, sorted(tensors.items()))) != manifest.payload:
        raise corrupt_wmatrix(path, f"payload {payload}", manifest.payload)
    # Version 0.1 named these tables `places`.
    tensors = {re.sub(r"^places\.", "position_embeddings.", n): t for n, t in tensors.items()}
    if not set(manifest.layers) <= set(range(len(source.layers))):
        expected = f"0 … {len(source.layers) - 1}"
        raise corrupt_wmatrix(path, f"source layers {manifest.layers}", expected)
    if manifest.residual and manifest.source_width != target.width:
        found = f"a residual map of {manifest.source_width} states"
        raise corrupt_wmatrix(path, found, target.width)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != manifest.tensor_shapes:
        wrong = sorted(set(shapes.items()) ^ set(manifest.tensor_shapes.items()))
        raise corrupt_wmatrix(path, f"tensors {wrong[:4]}", "the shapes of its geometries")
    count = len(target.layers)
    return WMatrix(
        manifest,
        **{name: tensors[name] for name in ("mean", "scale", "encode", "decode", "bias")},
        sink_keys=[tensors[f"sink.{i}.key"] for i in range(count)],
        sink_values=[tensors[f"sink.{i}.value"] for i in range(count)],
        position_embeddings={
            side: tensors[f"position_embeddings.{side}"]
            for side in manifest.position_embedding_shapes
        },
    )
