"""Every kernel compiled for one architecture, without a GPU: what the compiler says, as JSON.

    python tests/kernels/compile_kernels.py 90

A process of its own: in the tests' one, kernels are defined for Triton's interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from awareness_kernels import decode, encode, rotate
from awareness_kernels.launch import VECTOR, WARPS, Head
from awareness_kernels.reference import EPSILON
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HEADS = {
    "64": Head(64, 32, False, VECTOR, True),
    "128": Head(128, 64, False, VECTOR, True),
    "256": Head(256, 128, False, VECTOR, True),
    "128 woven": Head(128, 64, True, VECTOR, True),
    "128 partial": Head(128, 32, False, VECTOR, True),
    "80 partial": Head(80, 16, False, VECTOR, True),
    "96": Head(96, 48, False, VECTOR, True),
    "128 still": Head(128, 0, False, VECTOR, True),
    "128 strided": Head(128, 64, False, 1, False),
}
FP8 = ("fp8e5", "fp8e4nv")
STATES = dict.fromkeys(HEADS, ("bf16",))
STATES |= {"64": ("bf16", "fp8e5"), "128": ("bf16", "fp32", *FP8), "256": ("bf16", "fp8e5")}
"""The dtypes of states or pages that a head is compiled with."""
FP8_FROM = 89
"""The first architecture with numbers of four bits of exponent."""


@dataclass(frozen=True)
class Case:
    """A kernel as a launcher asks for it: its arguments' types, and which are multiples of 16."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    sixteens: tuple[str, ...] = field(default=())


def cases(architecture: int) -> Iterator[Case]:
    """Every kernel for every head and dtype that the architecture has."""
    for label, head in HEADS.items():
        for state in STATES[label]:
            if state == "fp8e4nv" and architecture < FP8_FROM:
                continue
            constants = head.constants | {"ROWS": head.rows}
            yield pack(f"pack_states, {label}, {state}", constants, state)
            yield scatter(f"scatter, {label}, {state}", constants, state)
            if head.rotated:
                yield turn(f"rotate, {label}, {state}", constants, state)
    for dtype in ("bf16", "fp32"):
        types = {"ids": "*i64", "embedding": f"*{dtype}", "stride": "i32", "mean": "*fp32"}
        types |= {"scale": "*fp32", "packed": f"*{dtype}", "features": "i32", "begin": "i32"}
        types |= {"embed": "i32", "first": "i32", "rows": "i32", "vocabulary": "i32"}
        constants = {"PREDECESSORS": 3, "TOKENS": encode.TOKENS, "DEPTH": encode.DEPTH}
        yield Case(
            f"pack_embeddings, {dtype}",
            encode.pack_embeddings_kernel,
            types,
            constants | {"EPS": EPSILON},
            ("embedding", "stride", "mean", "scale", "packed", "features", "begin", "embed"),
        )


def pack(name: str, constants: dict[str, Any], state: str) -> Case:
    types = {"table": "*i64", "source": "*i64", "masked": "*i1", "mean": "*fp32", "scale": "*fp32"}
    types |= {"packed": "*bf16", "features": "i32", "rows": "i32", "held": "i32"}
    sixteens = ("table", "source", "masked", "mean", "scale", "packed", "features")
    fixed = {"STATE": triton_type(state), "FIELDS": 8} | constants
    return Case(name, encode.pack_states_kernel, types, fixed, sixteens)


def scatter(name: str, constants: dict[str, Any], state: str) -> Case:
    types = {"table": "*i64", "scales": "*fp32", "mapped": "*bf16", "bias": "*fp32"}
    types |= {"positions": "*i64", "outputs": "i32"}
    types |= dict.fromkeys(("first", "rows", "sink", "held"), "i32")
    sixteens = ("table", "scales", "mapped", "bias", "positions", "outputs")
    fixed = {"PAGE": triton_type(state), "SINK": triton_type("bf16"), "FIELDS": 17} | constants
    return Case(name, decode.scatter_kernel, types, fixed, sixteens)


def turn(name: str, constants: dict[str, Any], state: str) -> Case:
    types = {"table": "*i64", "scales": "*fp32", "rows": "i32"}
    fixed = {"PAGE": triton_type(state), "FIELDS": 13} | constants
    return Case(name, rotate.rotate_kernel, types, fixed, ("table", "scales"))


def triton_type(name: str) -> Any:
    return triton.language.dtype(name)


def compiled(case: Case, architecture: int) -> dict[str, Any]:
    """What the compiler says: shared memory and stack in bytes, registers of a thread, and the
    bytes of each global load and store."""
    names = case.kernel.arg_names
    assert {*case.types, *case.constants} == {*names}, case.name
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.sixteens}
    signature = {name: case.types.get(name, "constexpr") for name in names}
    source = ASTSource(case.kernel, signature, case.constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": WARPS})
    used = resources(kernel.asm["cubin"])
    return {
        "name": case.name,
        "shared": kernel.metadata.shared,
        "registers": used["REG"],
        "stack": used["STACK"],
        "loads": accesses(kernel.asm["ptx"], "ld"),
        "stores": accesses(kernel.asm["ptx"], "st"),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and stack: what is spilled lies on the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        run = [tool, "-res-usage", str(path)]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}


def accesses(ptx: str, word: str) -> dict[int, int]:
    """How many global loads or stores there are of how many bytes."""
    counts: dict[int, int] = {}
    for count, bits in re.findall(rf"{word}\.global(?:\.\w+)*?(?:\.v(\d))?\.[busf](\d+)", ptx):
        size = int(count or 1) * int(bits) // 8
        counts[size] = counts.get(size, 0) + 1
    return counts


def main() -> None:
    architecture = int(sys.argv[1])
    for case in cases(architecture):
        print(json.dumps(compiled(case, architecture)), flush=True)


if __name__ == "__main__":
    main()
