"""The `.wmatrix` file: a safetensors file that holds one learned map and what is known of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.errors import BadInput
from awareness_vllm.files import private_copy, wmatrices_dir
from awareness_vllm.kernels import decode, encode
from awareness_vllm.packages.file import payload_digest
from awareness_vllm.packages.manifest import METADATA_KEY
from awareness_vllm.wmatrix.features import split_states
from awareness_vllm.wmatrix.manifest import WMatrixManifest, corrupt, read_manifest

REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class WMatrix:
    """The learned map. `mean` and `scale` [F] standardise features before `encode` [F, R];
    `decode` [R, O] and `bias` [O] give position-free target states; sinks are [S, H, D] as cached;
    `position_embeddings` are the tables that are among the features.
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
        """Share of the target states' variance that the map explains on held-out documents; None
        where nobody measured it."""
        found = self.manifest.r2.values()
        return sum(found) / len(found) if found else None

    @property
    def reconstruction_error(self) -> float | None:
        """Share of the features' variance that is lost in a round trip through the latent."""
        return self.manifest.reconstruction_error

    @property
    def payload(self) -> str:
        """sha256 over manifest and tensors: what tells this map from others, saved or not."""
        return payload_digest(self.manifest.model_dump_json(), sorted(self._tensors().items()))

    def register(self, name: str) -> Path:
        """Save under a name in `$AWARENESS_HOME/wmatrices`; the file's path."""
        if not REGISTERED.fullmatch(name):
            raise BadInput("not a W-Matrix name", found=repr(name), expected=REGISTERED.pattern)
        path = wmatrices_dir() / f"{name}.wmatrix"
        self.save(path)
        return path

    def map(
        self, source: Tensor | None, embeddings: Tensor, masked: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Target states for each token, keys position-free.

        Args:
            source: [T, source_width] float32 at the aligned source tokens; None blanks all states.
            embeddings: [T, embedding_width] float32, position embeddings after tokens'.
            blank: [T] bool, rows whose source states say nothing.

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
            flat += self.own_states(source, masked, len(flat))
        return split_states(self.manifest.target, flat)

    def own_states(self, source: Tensor | None, masked: Tensor | None, rows: int) -> Tensor:
        """What a residual map adds to, [rows, source_width]: the source's states, or their mean
        where they say nothing."""
        mean = self.mean[: self.manifest.source_width]
        if source is None:
            return mean.expand(rows, -1)
        return source if masked is None else torch.where(masked[:, None], mean, source)

    def position_latents(self) -> dict[str, Tensor]:
        """What each position adds to the latent, [P, R] of each side: the map is linear."""
        found, end = {}, self.manifest.source_width + self.manifest.token_width
        for side, table in sorted(self.position_embeddings.items()):
            part = slice(end, end := end + table.shape[1])
            rows = (table - self.mean[part]) * self.scale[part]
            found[side] = rows.to(self.encode.dtype) @ self.encode[part]
        return found

    def save(self, path: str | Path) -> None:
        """Write the file atomically; the payload digest is put into the manifest here."""
        path = Path(path)
        tensors = self._tensors()
        manifest = self.manifest.model_copy(update={"payload": self.payload})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, {METADATA_KEY: manifest.model_dump_json()})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

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
    """Read and verify a W-Matrix.

    Raises:
        WMatrixCorrupt: unreadable, altered, or shapes that contradict its geometries.
    """
    path = Path(path)
    manifest = read_manifest(path)
    source, target = manifest.source, manifest.target
    try:
        with private_copy(path) as copy, safe_open(copy, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            document = file.metadata()[METADATA_KEY]
    except (SafetensorError, OSError) as error:
        raise corrupt(path, str(error)) from error
    if (payload := payload_digest(document, sorted(tensors.items()))) != manifest.payload:
        raise corrupt(path, f"payload {payload}", manifest.payload)
    # Version 0.1 called these tables `places`.
    tensors = {re.sub(r"^places\.", "position_embeddings.", n): t for n, t in tensors.items()}
    if not set(manifest.layers) <= set(range(len(source.layers))):
        raise corrupt(path, f"source layers {manifest.layers}", f"0 … {len(source.layers) - 1}")
    if manifest.residual and manifest.source_width != target.width:
        raise corrupt(path, f"a residual map of {manifest.source_width} states", target.width)
    features = manifest.source_width + manifest.embedding_width
    shapes = {
        "mean": (features,),
        "scale": (features,),
        "encode": (features, manifest.rank),
        "decode": (manifest.rank, target.width),
        "bias": (target.width,),
    }
    for i, layer in enumerate(target.layers):
        shape = (len(manifest.sink), layer.heads, layer.head_dim)
        shapes |= {f"sink.{i}.key": shape, f"sink.{i}.value": shape}
    shapes |= {
        f"position_embeddings.{side}": shape
        for side, shape in manifest.position_embedding_shapes.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        wrong = sorted(set(found.items()) ^ set(shapes.items()))
        raise corrupt(path, f"tensors {wrong[:4]}", "the shapes of its geometries")
    count = len(target.layers)
    return WMatrix(
        manifest,
        mean=tensors["mean"],
        scale=tensors["scale"],
        encode=tensors["encode"],
        decode=tensors["decode"],
        bias=tensors["bias"],
        sink_keys=[tensors[f"sink.{i}.key"] for i in range(count)],
        sink_values=[tensors[f"sink.{i}.value"] for i in range(count)],
        position_embeddings={
            side: tensors[f"position_embeddings.{side}"]
            for side in manifest.position_embedding_shapes
        },
    )
