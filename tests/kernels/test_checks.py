"""What the fused operators refuse, by the argument's name, and what they take.

They run as users call them: the reference on a CPU, the kernels on a GPU.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from awareness_kernels import checks, ops, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.unit

Arguments = dict[str, Any]
Change = Callable[[Any], Any]

OPERATORS = ("encode_states", "decode_paged", "rotate_paged")
PAGES, SIZE, ROWS, SINK = 3, 4, 5, 1
SLOTS = PAGES * SIZE
POISON = 7.0


def valid(operator: str) -> Arguments:
    """Arguments of two layers that an operator takes; keys and values differ in heads and dims.
    Indices are on the host, where they are checked."""

    def some(*size: int) -> Tensor:
        return torch.linspace(0.5, 1, torch.Size(size).numel(), device=DEVICE).view(size)

    def two(*size: int) -> list[Tensor]:
        return [some(*size) for _ in range(2)]

    def pages(*heads: int) -> list[Tensor]:
        return [torch.full((PAGES, SIZE, *heads), POISON, device=DEVICE) for _ in range(2)]

    def count(end: int) -> Tensor:
        return torch.arange(end)

    if operator == "encode_states":
        features = 2 * (2 * 8 + 3 * 6) + 2 * 4
        found = [two(6, 2, 8), two(6, 3, 6), two(6, 4), two(6, 4), [0, 1]]
        found += [count(ROWS), count(ROWS) == 2, count(SINK + ROWS), some(7, 4)]
        found += [some(features), some(features), some(features, 3), 1, SINK]
    elif operator == "decode_paged":
        rows, outputs = SINK + ROWS, 2 * (2 * 8 + 3 * 6)
        found = [some(ROWS, 3), some(3, outputs), some(outputs), count(rows)]
        found += [two(rows, 4), two(rows, 4), [0, 1], two(SINK, 2, 8), two(SINK, 3, 6)]
        found += [pages(2, 8), pages(3, 6), [count(rows), count(rows) + SIZE], some(4)]
    else:
        found = [pages(2, 8), [count(ROWS), count(ROWS) + SIZE], two(4), two(4), [0, 1], some(2)]
    names = inspect.signature(getattr(reference, operator)).parameters
    return dict(zip(names, found, strict=True))


def altered(operator: str, name: str, change: Change) -> Arguments:
    """Valid arguments but for one; `name` may have an index."""
    arguments = valid(operator)
    argument, *item = re.findall(r"\w+", name)
    if item:
        arguments[argument][int(item[0])] = change(arguments[argument][int(item[0])])
    else:
        arguments[argument] = change(arguments[argument])
    return arguments


def pages_of(arguments: Arguments) -> list[Tensor]:
    return [page for name in arguments if name.endswith("_pages") for page in arguments[name]]


def refused(
    operator: str, arguments: Arguments, name: str, error: type[Exception] = ValueError
) -> str:
    """The message that an operator refuses arguments with: it names one. Nothing is written."""
    before = [page.clone() for page in pages_of(arguments)]
    with pytest.raises(error, match=f"^{re.escape(name)}: .* expected ") as caught:
        getattr(ops, operator)(*arguments.values())
    assert all(map(torch.equal, pages_of(arguments), before))
    return str(caught.value)


def strided(x: Tensor) -> Tensor:
    """The same numbers, each beside one that is not of the tensor."""
    return torch.stack((x, x), dim=-1)[..., 0]


def columns(x: Tensor) -> Tensor:
    """The same rows, laid column by column."""
    return x.T.contiguous().T


def with_last(last: int) -> Change:
    return lambda x: torch.cat((x[:-1], x.new_tensor([last])))


def shorter(x: Tensor) -> Tensor:
    return x[:-1].contiguous()


def narrower(x: Tensor) -> Tensor:
    return x[..., :-1].contiguous()


def twice(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=-1)


def nested(x: Tensor) -> Tensor:
    return x[None]


FAULTS: dict[str, tuple[str, str, Change, type[Exception]]] = {
    "a dim too many": ("encode_states", "weight", nested, ValueError),
    "a layer's own shape": ("decode_paged", "value_pages[1]", shorter, ValueError),
    "a shape that follows from another argument": ("encode_states", "mean", shorter, ValueError),
    "fewer rows than the latent has": (
        "decode_paged", "positions", lambda x: x[: ROWS - 1], ValueError,
    ),
    "an odd head dim": ("rotate_paged", "key_pages[0]", narrower, ValueError),
    "more angles than pairs": ("rotate_paged", "cos[0]", twice, ValueError),
    "sines unlike the cosines": ("encode_states", "sin[0]", narrower, ValueError),
    "gaps between numbers": ("decode_paged", "latent", strided, ValueError),
    "rows laid by columns": ("encode_states", "embedding", columns, ValueError),
    "a sink's rows with gaps": ("decode_paged", "sink_keys[0]", strided, ValueError),
    "an index below all": ("encode_states", "source", with_last(-1), ValueError),
    "an index beyond all": ("encode_states", "ids", with_last(7), ValueError),
    "a position beyond the angles": ("decode_paged", "positions", with_last(6), ValueError),
    "a slot beyond the pages": ("rotate_paged", "slot_mapping[1]", with_last(SLOTS), ValueError),
    "a slot that would overflow": (
        "decode_paged", "slot_mapping[0]", with_last(2**62), ValueError,
    ),
    "neither true nor false": ("encode_states", "interleaved[1]", lambda _: 2, ValueError),
    "too small a number": ("encode_states", "predecessors", lambda _: -2, ValueError),
    "a negative number": ("encode_states", "sink", lambda _: -1, ValueError),
    "a dtype unlike the other layer's": ("encode_states", "keys[1]", Tensor.half, TypeError),
    "a dtype unlike the keys'": ("decode_paged", "value_pages[0]", Tensor.half, TypeError),
    "a dtype unlike the sink's keys": ("decode_paged", "sink_values[1]", Tensor.half, TypeError),
    "angles of half precision": ("rotate_paged", "sin[0]", Tensor.half, TypeError),
    "an index of 32 bits": ("decode_paged", "slot_mapping[1]", Tensor.int, TypeError),
}  # fmt: skip
"""For each kind of fault an operator, an argument, what is done to it, and the error."""


def tensors_of(operator: str) -> list[str]:
    """An operator's tensor arguments, by the name that an error says; of lists, the second one."""
    return [
        f"{name}[1]" if isinstance(x, list) else name
        for name, x in valid(operator).items()
        if isinstance(x[1] if isinstance(x, list) else x, Tensor)
    ]


@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_valid_runs(operator: str) -> None:
    arguments = valid(operator)
    getattr(ops, operator)(*arguments.values())
    assert all((page != POISON).any() for page in pages_of(arguments))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    operator, name, change, error = FAULTS[fault]
    refused(operator, altered(operator, name, change), name, error)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_tensor_goes_unchecked(operator: str) -> None:
    for name in tensors_of(operator):
        refused(operator, altered(operator, name, nested), name)
        refused(operator, altered(operator, name, Tensor.short), name, TypeError)
        arguments = altered(operator, name, lambda x: x.to("meta"))
        # Called directly: torch gives an operator with a meta tensor to its fake.
        with pytest.raises(ValueError, match=f"^{re.escape(name)}: device meta, expected {DEVICE}"):
            getattr(checks, operator)(*arguments.values())


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_list_goes_unchecked(operator: str) -> None:
    for name, x in valid(operator).items():
        if isinstance(x, list):
            refused(operator, altered(operator, name, lambda x: x[:1]), name)


@pytest.mark.parametrize(
    ("operator", "short", "name"),
    [
        ("encode_states", ("keys[0]", "keys[1]", "values[0]", "values[1]"), "source"),
        ("encode_states", ("cos[1]", "sin[1]"), "source"),
        ("decode_paged", ("cos[1]", "sin[1]"), "positions"),
    ],
)
def test_an_index_is_in_the_shortest_of_what_it_indexes(
    operator: str, short: tuple[str, ...], name: str
) -> None:
    arguments = valid(operator)
    for part in short:
        argument, i = re.findall(r"\w+", part)
        arguments[argument][int(i)] = arguments[argument][int(i)][:4]
    refused(operator, arguments, name)


@pytest.mark.parametrize(("operator", "name"), [("encode_states", "keys"), ("decode_paged", "cos")])
def test_there_is_a_layer(operator: str, name: str) -> None:
    arguments = {k: [] if isinstance(x, list) else x for k, x in valid(operator).items()}
    refused(operator, arguments, name)


def test_the_message_says_what_was_found_and_expected() -> None:
    arguments = altered("decode_paged", "slot_mapping[1]", with_last(SLOTS + 3))
    message = refused("decode_paged", arguments, "slot_mapping[1]")
    assert {str(SLOTS + 3), str(SLOTS)} <= set(re.findall(r"\d+", message))
    arguments = altered("decode_paged", "weight", shorter)
    message = refused("decode_paged", arguments, "weight")
    assert "(2, 68)" in message
    assert "(3, 68)" in message


def test_a_kernel_takes_no_float64() -> None:
    """It would read such a table as float32. Meta stands for any device but a CPU."""
    arguments = altered("rotate_paged", "cos[0]", Tensor.double)
    for name in ("key_pages", "slot_mapping", "cos", "sin"):
        arguments[name] = [x.to("meta") for x in arguments[name]]
    arguments["scales"] = arguments["scales"].to("meta")
    with pytest.raises(TypeError, match=r"^cos\[0\]: dtype torch\.float64"):
        checks.rotate_paged(*arguments.values())


def test_the_dtypes_of_caches_are_those_that_kernels_know() -> None:
    from awareness_kernels.launch import SCALARS

    assert set(checks.CACHED) == set(SCALARS)


def none(x: Tensor) -> Tensor:
    return x[:0]


def still(x: list[Tensor]) -> list[Tensor]:
    return [table[..., :0] for table in x]


def each(change: Change) -> Change:
    return lambda x: [change(item) for item in x]


def head_by_head(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).contiguous().transpose(-3, -2)


def float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e5m2)


def skipped(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.iinfo(torch.int64).min)


UNUSUAL: dict[str, dict[str, dict[str, Change]]] = {
    "encode_states": {
        "states by any strides": {"keys": each(strided), "values": each(head_by_head)},
        "embeddings with gaps between rows": {"embedding": lambda x: twice(x)[:, :4]},
        "no rotary positions": {"cos": still, "sin": still},
        "no tokens": {"source": none, "masked": none, "ids": lambda x: x[:SINK]},
        "no embeddings": {
            "predecessors": lambda _: -1,
            **dict.fromkeys(("mean", "scale", "weight"), lambda x: x[:-8]),
        },
        "other dtypes": {
            "keys": each(Tensor.half),
            "values": each(Tensor.half),
            "embedding": Tensor.bfloat16,
            "weight": Tensor.bfloat16,
        },
    },
    "decode_paged": {
        "a sink alone": {
            "latent": none,
            "sink_keys": each(lambda x: x.expand(SINK + ROWS, -1, -1)),
            "sink_values": each(lambda x: x.expand(SINK + ROWS, -1, -1)),
        },
        "no sink": {
            "positions": lambda x: x[SINK:],
            "slot_mapping": each(lambda x: x[SINK:]),
            "sink_keys": each(none),
            "sink_values": each(none),
        },
        "no rotary positions": {"cos": still, "sin": still},
        "a sink's position beyond the tables": {
            "positions": lambda x: x.clone().index_fill_(0, x[:1], 99)
        },
        "pages by any strides": {"key_pages": each(strided), "value_pages": each(head_by_head)},
        "nothing to write": {"slot_mapping": each(skipped)},
        "other dtypes": {
            "latent": Tensor.half,
            "weight": Tensor.bfloat16,
            "key_pages": each(float8),
            "value_pages": each(float8),
        },
    },
    "rotate_paged": {
        "no layers": dict.fromkeys(
            ("key_pages", "slot_mapping", "cos", "sin", "interleaved", "scales"), none
        ),
        "no rows": {"slot_mapping": each(none)},
        "no rotary positions": {"cos": still, "sin": still},
        "pages by any strides": {"key_pages": each(head_by_head)},
        "nothing to rewrite": {"slot_mapping": each(skipped)},
        "other dtypes": {"key_pages": each(float8)},
    },
}


@pytest.mark.parametrize(
    ("operator", "changes"),
    [
        pytest.param(operator, changes, id=f"{operator}-{what}")
        for operator, unusual in UNUSUAL.items()
        for what, changes in unusual.items()
    ],
)
def test_what_is_unusual_runs_too(operator: str, changes: dict[str, Change]) -> None:
    arguments = valid(operator)
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    getattr(ops, operator)(*arguments.values())


@pytest.mark.skipif(DEVICE == "cuda", reason="a kernel takes no float64")
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_oracle_runs(operator: str) -> None:
    arguments = valid(operator)
    for name, x in arguments.items():
        tensors = x if isinstance(x, list) else [x]
        if isinstance(tensors[0], Tensor) and tensors[0].is_floating_point():
            doubled = [tensor.double() for tensor in tensors]
            arguments[name] = doubled if isinstance(x, list) else doubled[0]
    getattr(ops, operator)(*arguments.values())


@pytest.mark.parametrize("indices", ["cpu", "meta"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_host_never_waits_for_the_device(operator: str, indices: str) -> None:
    """A tensor on "meta" has no numbers to wait for: whoever asked for one would raise."""
    arguments = valid(operator)
    for name, x in arguments.items():
        device = indices if name in checks.INDICES else "meta"
        if isinstance(x, list):
            arguments[name] = [y.to(device) if isinstance(y, Tensor) else y for y in x]
        elif isinstance(x, Tensor):
            arguments[name] = x.to(device)
    getattr(checks, operator)(*arguments.values())


@pytest.mark.parametrize("operator", OPERATORS[1:])
def test_each_head_may_have_its_own_scale(operator: str) -> None:
    arguments = valid(operator)
    heads = sum(page.shape[2] for page in pages_of(arguments))
    ones = torch.ones(heads + 1, device=DEVICE)
    getattr(ops, operator)(*(arguments | {"scales": ones[:heads]}).values())
    refused(operator, arguments | {"scales": ones}, "scales")


@settings(max_examples=100, deadline=None)
@given(data=st.data(), operator=st.sampled_from(OPERATORS[1:]))
def test_all_slots_are_in_the_pages_or_nothing_is_written(
    data: st.DataObject, operator: str
) -> None:
    arguments = valid(operator)
    arguments["slot_mapping"] = [
        torch.tensor(
            data.draw(st.lists(st.integers(-3, SLOTS - 1), min_size=len(x), max_size=len(x)))
        )
        for x in arguments["slot_mapping"]
    ]
    layer = data.draw(st.none() | st.integers(0, 1))
    if layer is not None:
        slot_mapping = arguments["slot_mapping"][layer]
        at = data.draw(st.integers(0, len(slot_mapping) - 1))
        slot_mapping[at] = data.draw(st.integers(SLOTS, SLOTS + 2) | st.integers(SLOTS, 2**63 - 1))
    if layer is not None:
        refused(operator, arguments, f"slot_mapping[{layer}]")
        return
    getattr(ops, operator)(*arguments.values())
    for i, page in enumerate(pages_of(arguments)):
        named = torch.zeros(SLOTS, dtype=torch.bool, device=DEVICE)
        slot_mapping = arguments["slot_mapping"][i % 2]
        named[slot_mapping[slot_mapping >= 0]] = True
        assert torch.equal((page.flatten(0, 1) != POISON).any(-1).any(-1), named)
