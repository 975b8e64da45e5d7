"""The memory that maps take on a device, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from awareness_vllm.align.workspace import LANES, PADDING, WRITES
from awareness_vllm.kernels import ops
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import cos_sin_table
from awareness_vllm.wmatrix.manifest import WMatrixManifest

CHUNK_ROWS = 2048
"""Rows of a memory that are encoded, or decoded, at once: enough for efficient products."""
CHUNK_BYTES = 2**28
"""Bytes that a chunk's states take at most, on the device and in pinned host memory."""
ROW_STEP = 128
"""What a chunk's rows are a multiple of where CHUNK_BYTES bounds them: a tile of a product."""
UPLOAD_BYTES = 2**25
"""Bytes of one layer's keys and values that copies and heads are uploaded by."""
FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one map: `tensors` of its own; the staging of one chunk (`chunk`) and of one write
    (`write`); what operators need beside, to encode a chunk and to write one."""

    tensors: int
    chunk: int
    write: int
    encoding: int
    writing: int

    @classmethod
    def of(cls, manifest: WMatrixManifest, heads: Mapping[int, slice], itemsize: int) -> Footprint:
        """A map's bytes by its manifest.

        Args:
            heads: this rank's target layers, and its KV heads of each.
            itemsize: bytes of a number of the map's products.
        """
        layers = [(manifest.target.layers[i], part) for i, part in heads.items()]
        states = sum(len(range(layer.heads)[part]) * layer.head_dim for layer, part in layers)
        outputs, rank = 2 * states, manifest.rank
        features = manifest.source_width + manifest.token_width
        rows, hidden = chunk_rows(manifest), manifest.target.hidden_size
        before = (manifest.predecessors or 0) * FLOAT * hidden
        staged = 2 * len(manifest.layers) + 2 * len(source_schemes(manifest)) + 1
        return cls(
            tensors=itemsize * rank * (features + outputs)
            + FLOAT * (2 * features + rank + outputs + len(manifest.sink) * outputs),
            chunk=rows * staged_row_bytes(manifest) + before + staged * PADDING,
            write=itemsize * rows * rank + 2 * FLOAT * outputs + 2 * PADDING,
            # Embeddings where the device looks them up; the latent, and its check in float32.
            encoding=FLOAT * rows * hidden
            + before
            + min(ops.SCRATCH, itemsize * rows * features)
            + rows * rank * (itemsize + 2 * FLOAT),
            writing=min(ops.SCRATCH, itemsize * rows * outputs),
        )


def device_bytes(
    manifests: Iterable[tuple[WMatrixManifest, int]], heads: Mapping[int, slice], positions: int
) -> int:
    """What maps, and copies, take of a device together, while they load and write.

    Args:
        manifests: of each map, with the bytes of a number of its products.
        heads: this rank's target layers, and its KV heads of each.
        positions: in use by the target.
    """
    maps = [(m, Footprint.of(m, heads, itemsize)) for m, itemsize in manifests]
    if not maps:
        return WRITES * UPLOAD_BYTES
    schemes = {m.target.layers[i].positions for m, _ in maps for i in heads}
    tables = sum(2 * FLOAT * positions * pairs(scheme) for scheme in schemes)
    sizes = [size for _, size in maps]
    lane = max(size.chunk for size in sizes) + max(size.encoding for size in sizes)
    writes = WRITES * max(UPLOAD_BYTES, *(size.write for size in sizes))
    writing = max(size.writing for size in sizes)
    return sum(size.tensors for size in sizes) + tables + LANES * lane + writes + writing


def chunk_rows(manifest: WMatrixManifest) -> int:
    """Rows of a memory that are encoded at once: CHUNK_ROWS, or as many as CHUNK_BYTES hold."""
    fitting = CHUNK_BYTES // staged_row_bytes(manifest) // ROW_STEP * ROW_STEP
    return max(ROW_STEP, min(CHUNK_ROWS, fitting))


def staged_row_bytes(manifest: WMatrixManifest) -> int:
    """Bytes of one row of a chunk: source states, angles of each descriptor, and an embedding,
    which over several ranks comes from the host."""
    dtype: torch.dtype = getattr(torch, manifest.source.dtype)
    angles = sum(2 * FLOAT * pairs(scheme) for scheme in source_schemes(manifest))
    return manifest.source_width * dtype.itemsize + angles + FLOAT * manifest.target.hidden_size


def source_schemes(manifest: WMatrixManifest) -> set[Positions]:
    """The distinct positional descriptors of the source layers that a map reads."""
    return {manifest.source.layers[i].positions for i in manifest.layers}


def pairs(scheme: Positions) -> int:
    """The pairs of dims that a positional scheme rotates."""
    return cos_sin_table(torch.arange(1), scheme)[0].shape[1]
