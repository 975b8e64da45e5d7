"""The writer of cached states into paged blocks on a CUDA device: staged uploads, layer by layer,
then one rotation of all keys in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from awareness_vllm.align.footprint import UPLOAD_BYTES
from awareness_vllm.align.kv_writer import KVWriter, Layers
from awareness_vllm.align.paged import Pages, scale_table
from awareness_vllm.align.workspace import PADDING, DeviceWorkspace
from awareness_vllm.kernels import ops, rotate
from awareness_vllm.models.geometry import Positions
from awareness_vllm.models.rope import offset_angles


@dataclass(frozen=True)
class DeviceKVWriter(KVWriter):
    """A writer whose keys are written as they are and then moved by `ops.rotate_paged`, in one
    launch for all layers; `pages` are the layers' in the order of `groups`."""

    pages: Callable[[], Sequence[Pages]]
    workspace: DeviceWorkspace

    @classmethod
    def of(
        cls,
        writer: KVWriter,
        pages: Callable[[], Sequence[Pages]],
        workspace: DeviceWorkspace,
    ) -> DeviceKVWriter:
        """The writer of the same layers on their device. Raises torch.OutOfMemoryError."""
        workspace.reserve(0, UPLOAD_BYTES)
        fields = (writer.layers, writer.groups, writer.heads, writer.geometry, writer.dtype)
        return cls(*fields, pages, workspace)

    def place(
        self,
        keys: Layers,
        values: Layers,
        begin: int,
        offset: int,
        slot_mapping: Sequence[Tensor],
        *,
        length: int | None = None,
    ) -> None:
        """As `KVWriter.place`; the host waits for no more than its own staging buffers."""
        rows = list(self.rows(keys, values, begin, slot_mapping, length))
        turns = self.turns(offset)  # refuses before anything is written
        pages = list(self.pages())
        coarse = is_coarse(pages)
        slots: dict[int, Tensor] = {}
        for i, key, value, mapped in rows:
            if id(mapped) not in slots:  # once for each group
                slots[id(mapped)] = self.uploaded(mapped)
            turn = turns[i] if offset and coarse else None
            self.write_staged(i, key, value, slots[id(mapped)], turn)
        if offset and not coarse:
            self.rotate(turns, pages, slot_mapping)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Rotate keys of no slots, so that no request is the first to."""
        pages = list(self.pages())
        if not self.geometry.additive and not is_coarse(pages):
            nowhere = torch.full((1,), -1)
            self.rotate(self.turns(1), pages, [nowhere] * (1 + max(self.groups.values())))

    def write_staged(
        self,
        index: int,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        turn: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Upload one layer's keys and values [N, H, D] and write them to slots [N] on the device,
        rotated by a `turn`'s cosines and sines [C]."""
        key, value = (state[:, self.heads[index]].to(self.dtype) for state in (key, value))
        if not len(key):
            return
        row = 2 * key.shape[1] * key.shape[2] * key.element_size()
        rows = max(1, (UPLOAD_BYTES - 2 * PADDING) // row)
        parts = [state.split(rows) for state in (key, value)]
        begin = 0
        layer = self.layers[index]
        for key_part, value_part in zip(*parts, strict=True):
            staging = next(self.workspace.next_write)
            keys, values = staging.upload([key_part, value_part])
            staging.begin_use()
            if turn is not None:
                cos, sin = (table.expand(len(keys), -1) for table in turn)
                keys = rotate(keys, cos, sin, self.positions(index).interleaved).to(self.dtype)
            end = begin + len(keys)
            cache, slots = layer.kv_cache, slot_mapping[begin:end]
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
            staging.end_use()
            begin = end

    def rotate(
        self,
        turns: dict[int, tuple[Tensor, Tensor]],
        pages: Sequence[Pages],
        slot_mapping: Sequence[Tensor],
    ) -> None:
        """Rotate the keys in slots [N], per KV cache group, by their layers' turns."""
        scales = scale_table([(page.key_scale, page.keys) for page in pages])
        ops.rotate_paged(
            [page.keys for page in pages],
            [slot_mapping[group] for group in self.groups.values()],
            [turns[i][0] for i in self.groups],
            [turns[i][1] for i in self.groups],
            [int(self.positions(i).interleaved) for i in self.groups],
            self.uploaded(scales),
        )

    def turns(self, offset: int) -> dict[int, tuple[Tensor, Tensor]]:
        """Cosines and sines [C] of an offset on the device, by layer; one pair for each distinct
        descriptor. Raises UnsupportedModel."""
        if not offset:
            return {}
        schemes = dict.fromkeys(self.positions(i) for i in self.groups)
        angles = {
            scheme: tuple(self.uploaded(table[0]) for table in offset_angles(offset, scheme))
            for scheme in schemes
        }
        return {i: angles[self.positions(i)] for i in self.groups}  # type: ignore[misc]

    def positions(self, index: int) -> Positions:
        """A layer's positional descriptor."""
        return self.geometry.layers[index].positions

    def uploaded(self, tensor: Tensor) -> Tensor:
        """A small tensor on the device; the host does not wait."""
        if self.workspace.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.workspace.device, non_blocking=True)


def is_coarse(pages: Sequence[Pages]) -> bool:
    """Whether keys are stored in eight bits: rounded before a rotation, they would be rounded once
    more after it, as coarsely."""
    return any(page.keys.element_size() == 1 for page in pages)
