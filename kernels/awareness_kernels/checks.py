"""What the fused operations ask of their arguments, checked before anything is read or written.

A kernel believes the addresses, strides and indices that it is given. What is wrong is refused here
by a ValueError, or a TypeError for a dtype, that names the argument, what was found and what was
expected. Parameters and letters are those of `reference`.

Indices may be on the host beside tensors of a device, and there their ranges are checked. On a
device they are not: the host would wait for it. The kernels leave out a row whose index is out of
range, so that nothing is read or written beside the tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CACHED = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of `launch.SCALARS`: a CPU needs no Triton, so it cannot be asked."""
SINGLE = (torch.float32,)
INDEX = (torch.int64,)
ANY = torch.iinfo(torch.int64).min

INDICES = ("source", "masked", "ids", "positions", "slot_mapping")
"""Arguments that may stay on the host."""

Tensors = Sequence[Tensor]
Shape = Sequence[int | str]
"""A word stands for any size."""
Range = tuple[str, Tensor, int, int]
"""An argument's name, its indices [T], and the range [least, end) that they must be in."""


def encode_states(
    keys: Tensors,
    values: Tensors,
    cos: Tensors,
    sin: Tensors,
    interleaved: Sequence[int],
    source: Tensor,
    masked: Tensor,
    ids: Tensor,
    embedding: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    predecessors: int,
    sink: int,
) -> None:
    """keys, values [N, H, D]; cos, sin [P, C]; source, masked [T]; ids [sink + T];
    embedding [V, E]; mean, scale [F]; weight [F, R]."""
    _alike(locals(), layers=1)
    shapes = [(*keys[0].shape[:1], "H", "D")] * len(keys)
    _states(keys=(keys, shapes), values=(values, shapes))
    _turns(cos, sin, interleaved, keys, "P")
    _require(predecessors >= -1, "predecessors", "number", predecessors, "-1 or more")
    _require(sink >= 0, "sink", "number", sink, "0 or more")
    _tensor("source", source, INDEX, "T")
    _tensor("masked", masked, (torch.bool,), len(source))
    _tensor("ids", ids, INDEX, sink + len(source))
    _tensor("embedding", embedding, FLOATS, "V", "E", dense=False)
    _dense_rows("embedding", embedding)
    features = sum(state.shape[1] * state.shape[2] for state in (*keys, *values))
    features += (1 + predecessors) * embedding.shape[1]
    _tensor("mean", mean, FLOATS, features)
    _tensor("scale", scale, FLOATS, features)
    _tensor("weight", weight, FLOATS, features, "R")
    tokens = min(map(len, (keys[0], *cos)))
    _in_range(("source", source, 0, tokens), ("ids", ids, 0, len(embedding)))


def decode_paged(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    cos: Tensors,
    sin: Tensors,
    interleaved: Sequence[int],
    sink_keys: Tensors,
    sink_values: Tensors,
    key_pages: Tensors,
    value_pages: Tensors,
    slot_mapping: Tensors,
    scales: Tensor,
) -> None:
    """latent [T, R]; weight [R, O]; bias [O]; positions [S + T]; cos, sin [P, C]; sink_keys,
    sink_values [S, H, D]; pages [pages, page size, H, D]; slot_mapping [S + T]; scales [2 L]."""
    _alike(locals(), layers=1)
    _tensor("latent", latent, FLOATS, "T", "R")
    _tensor("positions", positions, INDEX, "S + T")
    sink = len(positions) - len(latent)
    _require(sink >= 0, "positions", "rows", len(positions), f"at least latent's {len(latent)}")
    _states(
        key_pages=(key_pages, [("pages", "page size", "H", "D")] * len(key_pages)),
        value_pages=(value_pages, [(*page.shape[:2], "H", "D") for page in key_pages]),
    )
    _states(
        sink_keys=(sink_keys, [(sink, *page.shape[2:]) for page in key_pages]),
        sink_values=(sink_values, [(sink, *page.shape[2:]) for page in value_pages]),
    )
    for i, (key, value) in enumerate(zip(sink_keys, sink_values, strict=True)):
        _dense_rows(f"sink_keys[{i}]", key)
        _dense_rows(f"sink_values[{i}]", value)
    _turns(cos, sin, interleaved, key_pages, "P")
    outputs = sum(page.shape[2] * page.shape[3] for page in (*key_pages, *value_pages))
    _tensor("weight", weight, FLOATS, latent.shape[1], outputs)
    _tensor("bias", bias, FLOATS, outputs)
    _scales(scales, (*key_pages, *value_pages))
    # A sink's keys are as cached: nothing looks its positions up.
    rotated = ("positions", positions[sink:], 0, min(map(len, cos)))
    _in_range(rotated, *_slot_mapping(slot_mapping, key_pages, len(positions)))


def rotate_paged(
    key_pages: Tensors,
    slot_mapping: Tensors,
    cos: Tensors,
    sin: Tensors,
    interleaved: Sequence[int],
    scales: Tensor,
) -> None:
    """key_pages [pages, page size, H, D]; slot_mapping [T]; cos, sin [C]; scales [L]."""
    _alike(locals(), layers=0)
    _states(key_pages=(key_pages, [("pages", "page size", "H", "D")] * len(key_pages)))
    _turns(cos, sin, interleaved, key_pages)
    _scales(scales, key_pages)
    # The kernel goes through as many rows in every layer.
    rows = slot_mapping[0].numel() if slot_mapping else 0
    _in_range(*_slot_mapping(slot_mapping, key_pages, rows))


def _require(holds: bool, name: str, what: str, found: object, expected: object) -> None:
    if not holds:
        error = TypeError if what == "dtype" else ValueError
        raise error(f"{name}: {what} {found}, expected {expected}")


def _alike(arguments: Mapping[str, Any], layers: int) -> None:
    """All lists are equally long, `layers` at least; all tensors are on one device, but for indices
    on the host."""
    lists = {name: x for name, x in arguments.items() if isinstance(x, (list, tuple))}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    for name, items in lists.items():
        _require(len(items) >= layers, name, "layers", len(items), f"{layers} or more")
        tensors |= {f"{name}[{i}]": x for i, x in enumerate(items) if isinstance(x, Tensor)}
    lengths = {name: len(items) for name, items in lists.items()}
    devices = {
        name: x.device
        for name, x in tensors.items()
        if not (name.split("[")[0] in INDICES and x.device.type == "cpu")
    }
    for what, values in (("layers", lengths), ("device", devices)):
        # The one that differs from most is at fault.
        usual = Counter(values.values()).most_common(1)[0][0] if values else 0
        for name, value in values.items():
            _require(value == usual, name, what, value, f"{usual} as others")


def _tensor(
    name: str, x: Tensor, dtypes: Sequence[torch.dtype], *shape: int | str, dense: bool = True
) -> None:
    """x has one of the dtypes and the shape; `dense`: it is contiguous."""
    # The oracle is in float64, on a CPU alone: kernels would read such tables as float32.
    oracle = x.dtype == torch.float64 and torch.float32 in dtypes and x.device.type == "cpu"
    _require(x.dtype in dtypes or oracle, name, "dtype", x.dtype, dtypes)
    fits = x.ndim == len(shape)
    fits = fits and all(a == b or isinstance(b, str) for a, b in zip(x.shape, shape, strict=True))
    _require(fits, name, "shape", tuple(x.shape), shape)
    _require(not dense or x.is_contiguous(), name, "strides", x.stride(), "contiguous ones")


def _dense_rows(name: str, x: Tensor) -> None:
    """What lies between the last dim's numbers, no kernel steps over."""
    _require(x.stride(-1) == 1, name, "strides", x.stride(), "contiguous rows")


def _states(**lists: tuple[Tensors, Sequence[Shape]]) -> None:
    """States [..., D] of each layer's shape, D even: a kernel goes pair by pair. They have one
    dtype: it reads all of them through pointers of one type."""
    dtypes: Sequence[torch.dtype] = CACHED
    for argument, (states, shapes) in lists.items():
        for i, (state, shape) in enumerate(zip(states, shapes, strict=True)):
            name = f"{argument}[{i}]"
            _tensor(name, state, dtypes, *shape, dense=False)
            dims = state.shape[-1]
            _require(dims % 2 == 0, name, "head dims", dims, "an even number")
            dtypes = (state.dtype,)


def _turns(
    cos: Tensors, sin: Tensors, interleaved: Sequence[int], states: Tensors, *rows: str
) -> None:
    """cos, sin [*rows, C] of each layer, whose states [..., D] have C pairs or more."""
    for i, (c, s, w, state) in enumerate(zip(cos, sin, interleaved, states, strict=True)):
        _tensor(f"cos[{i}]", c, SINGLE, *rows, "C")
        pairs, most = c.shape[-1], state.shape[-1] // 2
        _require(pairs <= most, f"cos[{i}]", "pairs", pairs, f"at most {most}")
        _tensor(f"sin[{i}]", s, SINGLE, *c.shape)
        _require(w in (0, 1), f"interleaved[{i}]", "number", w, "0 or 1")


def _scales(scales: Tensor, pages: Tensors) -> None:
    """One for each layer's pages, or for each of their heads."""
    heads = sum(page.shape[2] for page in pages)
    _tensor("scales", scales, SINGLE, heads if len(scales) == heads else len(pages))


def _slot_mapping(slot_mapping: Tensors, pages: Tensors, rows: int) -> list[Range]:
    """slot_mapping [rows] of each layer, within its pages; negative ones are skipped."""
    ranges = []
    for i, (slot, page) in enumerate(zip(slot_mapping, pages, strict=True)):
        _tensor(f"slot_mapping[{i}]", slot, INDEX, rows)
        ranges.append((f"slot_mapping[{i}]", slot, ANY, page.shape[0] * page.shape[1]))
    return ranges


def _in_range(*ranges: Range) -> None:
    """Indices on the host are in their ranges; one tensor is looked through once."""
    extremes: dict[tuple[int, int], list[int]] = {}
    for name, x, least, end in ranges:
        if not len(x) or x.device.type != "cpu":
            continue
        key = (x.data_ptr(), len(x))
        if key not in extremes:
            extremes[key] = [int(extreme) for extreme in x.aminmax()]
        low, high = extremes[key]
        _require(low >= least, name, "least index", low, f"{least} or more")
        _require(high < end, name, "greatest index", high, f"less than {end}")
