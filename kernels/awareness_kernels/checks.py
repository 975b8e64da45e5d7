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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CACHED = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
"""The dtypes of `launch.SCALARS`: a CPU needs no Triton, so it cannot be asked."""
SINGLE = (torch.float32,)
INDEX = (torch.int64,)
ANY = torch.iinfo(torch.int64).min

HOST = torch.device("cpu")
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
    tokens = _shortest([keys[0], *cos])
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
    rows, sink = positions.shape[0], positions.shape[0] - latent.shape[0]
    _require(sink >= 0, "positions", "rows", rows, f"at least latent's {latent.shape[0]}")
    own = [key.shape for key in key_pages], [value.shape for value in value_pages]
    free: Shape = ("pages", "page size", "H", "D")
    _states(
        key_pages=(key_pages, [free] * len(key_pages)),
        value_pages=(value_pages, [(*shape[:2], *free[2:]) for shape in own[0]]),
    )
    _states(
        sink_keys=(sink_keys, [(sink, *shape[2:]) for shape in own[0]]),
        sink_values=(sink_values, [(sink, *shape[2:]) for shape in own[1]]),
    )
    for argument, sinks in (("sink_keys", sink_keys), ("sink_values", sink_values)):
        for name, i in _kinds(argument, sinks):
            _dense_rows(name, sinks[i])
    _turns(cos, sin, interleaved, key_pages, "P")
    outputs = sum(shape[2] * shape[3] for shape in (*own[0], *own[1]))
    _tensor("weight", weight, FLOATS, latent.shape[1], outputs)
    _tensor("bias", bias, FLOATS, outputs)
    _scales(scales, (*own[0], *own[1]))
    # A sink's keys are as cached: nothing looks its positions up.
    rotated = ("positions", positions[sink:], 0, _shortest(cos))
    _in_range(rotated, *_slot_mapping(slot_mapping, own[0], rows))


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
    shapes = [page.shape for page in key_pages]
    _scales(scales, shapes)
    # The kernel goes through as many rows in every layer.
    rows = slot_mapping[0].numel() if slot_mapping else 0
    _in_range(*_slot_mapping(slot_mapping, shapes, rows))


def _require(holds: bool, name: str, what: str, found: object, expected: object) -> None:
    if not holds:
        error = TypeError if what == "dtype" else ValueError
        raise error(f"{name}: {what} {found}, expected {expected}")


def _alike(arguments: Mapping[str, Any], layers: int) -> None:
    """All lists are equally long, `layers` at least; all tensors are on one device, but for indices
    on the host."""
    lists = {name: x for name, x in arguments.items() if isinstance(x, (list, tuple))}
    for name, items in lists.items():
        _require(len(items) >= layers, name, "layers", len(items), f"{layers} or more")
    _same({name: len(items) for name, items in lists.items()}, "layers")
    tensors = {name: [x] for name, x in arguments.items() if isinstance(x, Tensor)}
    tensors |= {name: [*x] for name, x in lists.items() if x and isinstance(x[0], Tensor)}
    found = {name: {x.device for x in items} for name, items in tensors.items()}
    devices = {name: x for name, x in found.items() if name not in INDICES or x != {HOST}}
    if len(set().union(*devices.values())) > 1:
        # The names of tensors, of which there are hundreds, are wanted only where one is at fault.
        _same(
            {
                f"{name}[{i}]" if name in lists else name: x.device
                for name in devices
                for i, x in enumerate(tensors[name])
            },
            "device",
        )


def _same(values: Mapping[str, object], what: str) -> None:
    """All values are equal; the one that differs from most is at fault."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else None
    for name, value in values.items():
        _require(value == usual, name, what, value, f"{usual} as others")


def _kinds(argument: str, tensors: Tensors, *beside: Sequence[Any]) -> Iterator[tuple[str, int]]:
    """Name and index of the first tensor of each kind: most layers are like another, and to check
    each of them would take longer than to rotate their keys. `beside`: what belongs to each."""
    same, kinds = set(), set()
    for i, (x, *rest) in enumerate(zip(tensors, *beside, strict=True)):
        if (tensor := (id(x), *rest)) in same:
            continue
        same.add(tensor)
        kind = (x.dtype, x.shape, x.stride(), *rest)
        if kind not in kinds:
            kinds.add(kind)
            yield f"{argument}[{i}]", i


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
        for name, i in _kinds(argument, states, shapes):
            _tensor(name, states[i], dtypes, *shapes[i], dense=False)
            dims = states[i].shape[-1]
            _require(dims % 2 == 0, name, "head dims", dims, "an even number")
            dtypes = (states[i].dtype,)


def _turns(
    cos: Tensors, sin: Tensors, interleaved: Sequence[int], states: Tensors, *rows: str
) -> None:
    """cos, sin [*rows, C] of each layer, whose states [..., D] have C pairs or more."""
    halves = [state.shape[-1] // 2 for state in states]
    for name, i in _kinds("cos", cos, halves):
        _tensor(name, cos[i], SINGLE, *rows, "C")
        pairs, most = cos[i].shape[-1], halves[i]
        _require(pairs <= most, name, "pairs", pairs, f"at most {most}")
    for name, i in _kinds("sin", sin, [c.shape for c in cos]):
        _tensor(name, sin[i], SINGLE, *cos[i].shape)
    for i, w in enumerate(interleaved):
        _require(w in (0, 1), f"interleaved[{i}]", "number", w, "0 or 1")


def _shortest(tensors: Tensors) -> int:
    """Rows of the shortest; most are one tensor."""
    return min(x.shape[0] for x in {id(x): x for x in tensors}.values())


def _scales(scales: Tensor, pages: Sequence[torch.Size]) -> None:
    """One for each layer's pages, or for each of their heads."""
    heads = sum(shape[2] for shape in pages)
    _tensor("scales", scales, SINGLE, heads if len(scales) == heads else len(pages))


def _slot_mapping(slot_mapping: Tensors, pages: Sequence[torch.Size], rows: int) -> list[Range]:
    """slot_mapping [rows] of each layer, within its pages; negative ones are skipped."""
    ends = [shape[0] * shape[1] for shape in pages]
    for name, i in _kinds("slot_mapping", slot_mapping):
        _tensor(name, slot_mapping[i], INDEX, rows)
    where = [x.data_ptr() if x.device == HOST else i for i, x in enumerate(slot_mapping)]
    different = _kinds("slot_mapping", slot_mapping, ends, where)
    return [(name, slot_mapping[i], ANY, ends[i]) for name, i in different]


def _in_range(*ranges: Range) -> None:
    """Indices on the host are in their ranges."""
    for name, x, least, end in ranges:
        if len(x) and x.device == HOST:
            low, high = map(int, x.aminmax())
            _require(low >= least, name, "least index", low, f"{least} or more")
            _require(high < end, name, "greatest index", high, f"less than {end}")
