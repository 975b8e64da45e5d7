"""A memory's latent for a device: encoded in chunks on its lanes, or that of a latent package."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.align.realign import BLOCK, latent_rows
from awareness_vllm.align.workspace import Staging
from awareness_vllm.models.rope import cos_sin_table
from awareness_vllm.packages.latent import LatentPackage
from awareness_vllm.wmatrix.features import Embed
from awareness_vllm.wmatrix.file import WMatrix


class LatentEncoding:
    """The latent of a package in steps of one chunk, which the device's lanes compute beside the
    caller.

    Args:
        keys, values: a package's, per source layer [T, H, D].
        ids, source: from `realign.sources`.
        embed: the target's embedding; it is called in a lane's thread.
    """

    def __init__(
        self,
        paged: PagedMap,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        ids: list[int],
        source: Tensor,
        embed: Embed,
    ) -> None:
        self.paged, self.keys, self.values = paged, keys, values
        self.source, self.embed = source, embed
        self.memory = Latent(ids, torch.empty(len(source), paged.rank, dtype=paged.encode.dtype))
        # A package of a wider dtype than the map's source had takes no more memory.
        expected: torch.dtype = getattr(torch, paged.manifest.source.dtype)
        wider = -(-keys[paged.manifest.layers[0]].element_size() // expected.itemsize)
        self.chunk_rows = max(1, paged.chunk_rows // wider)
        self.begin = 0
        self.running: list[Future[None]] = []

    @property
    def awaited(self) -> Sequence[Future[None]]:
        """What `step` waits for: its own chunks, or others' on all lanes."""
        return self.running or self.paged.workspace.running

    def step(self) -> bool:
        """Begin the next chunk where a lane is free; whether the memory is complete. Never waits.

        Raises:
            PackageCorrupt: states that no model computes. The features are never in memory here:
                what their latent shows is less than `WMatrix.map` sees, but numbers that are not
                finite, or far too large.
            torch.OutOfMemoryError: the device has no room for a chunk.
        """
        for ended in [future for future in self.running if future.done()]:
            self.running.remove(ended)
            ended.result()
        if self.begin < len(self.source):
            end = min(self.begin + self.chunk_rows, len(self.source))
            job = functools.partial(self.encode_chunk, self.begin, end)
            if (future := self.paged.workspace.submit(job)) is not None:
                self.running.append(future)
                self.begin = end
        return self.begin >= len(self.source) and not self.running

    @torch.inference_mode()
    def encode_chunk(self, begin: int, end: int, lane: Staging) -> None:
        """Encode rows begin … end-1 on a lane, to the end: the host waits."""
        paged, manifest = self.paged, self.paged.manifest
        source = self.source[begin:end]
        first, last = int(source.min()), int(source.max())
        tokens: slice | Tensor = slice(first, last + 1)
        index, positions = source - first, torch.arange(first, last + 1)
        if len(positions) > self.chunk_rows:  # only those that are read
            tokens, index, positions = source, torch.arange(len(source)), source
        schemes = [manifest.source.layers[i].positions for i in manifest.layers]
        angles = {scheme: cos_sin_table(positions, scheme) for scheme in dict.fromkeys(schemes)}
        states = [part[i][tokens] for part in (self.keys, self.values) for i in manifest.layers]
        # Rows before the chunk's first, whose embeddings it reads as its predecessors'.
        sink, reach = len(manifest.sink), manifest.predecessors or 0
        before = min(reach, sink + begin)
        embeddings = self.embedded(self.memory.ids[sink + begin - before : sink + end], lane)
        tables = [table for pair in angles.values() for table in pair]
        on_host = [embeddings] if embeddings.device.type == "cpu" else []
        copies = lane.upload([*states, *tables, *on_host])
        uploaded = iter(copies[len(states) :])
        placed = {scheme: (next(uploaded), next(uploaded)) for scheme in angles}
        count = len(schemes)
        with lane.stream.launching():
            paged.encode_rows(
                copies[:count],
                copies[count : len(states)],
                [placed[scheme] for scheme in schemes],
                index,
                source,
                next(uploaded, embeddings),
                before,
                out=self.memory.rows[begin:end],
            )
        where = {"source": source, "target": torch.arange(sink + begin, sink + end)}
        for side, latents in paged.position_embeddings.items():
            self.memory.rows[begin:end] += latents[where[side]]

    def embedded(self, ids: list[int], lane: Staging) -> Tensor:
        """The embeddings of some of the target's ids, on the lane's stream; a map that reads no
        tokens has none of them looked up."""
        if not self.paged.manifest.reads_tokens:
            return torch.zeros(len(ids), 1)
        with lane.stream.launching():
            return self.embed(torch.tensor(ids))


class LatentCopy:
    """The latent of a latent package for a map, checked in steps of one block."""

    def __init__(self, package: LatentPackage, wmatrix: WMatrix, ids: list[int]) -> None:
        self.package, self.wmatrix, self.begin = package, wmatrix, 0
        shape = package.info.tokens, package.info.rank
        self.memory = Latent(ids, torch.empty(shape, dtype=wmatrix.encode.dtype))

    def step(self) -> bool:
        """Take the next block; whether the memory is complete.

        Raises:
            PackageCorrupt: a latent that no states give.
        """
        block = slice(self.begin, self.begin + BLOCK)
        self.memory.rows[block] = latent_rows(self.package, self.wmatrix, block)
        self.begin = min(block.stop, len(self.memory.rows))
        return self.begin == len(self.memory.rows)


@torch.inference_mode()
def warm_up(paged: PagedMap, pages: Sequence[Pages]) -> None:
    """Encode a chunk on each lane and write it to rows without slots: the operators compile, and
    the device's allocator holds from then on what a load needs."""
    source, target = paged.manifest.source, paged.manifest.target
    sink, dtype = len(paged.manifest.sink), getattr(torch, source.dtype)
    rows = min(paged.chunk_rows, paged.workspace.positions - sink)
    if rows < 1:  # a context that no memory fits into
        return
    states = [
        torch.zeros(1, layer.heads, layer.head_dim, dtype=dtype).expand(rows, -1, -1)
        for layer in source.layers
    ]
    encoding = LatentEncoding(
        paged,
        states,
        states,
        [0] * (sink + rows),
        torch.arange(rows),
        lambda ids: torch.zeros(len(ids), target.hidden_size),
    )
    for lane in paged.workspace.lanes:
        encoding.encode_chunk(0, rows, lane)
    nowhere = torch.full((sink + rows,), -1)
    paged.write(encoding.memory, pages, [nowhere] * len(pages), begin=0)
