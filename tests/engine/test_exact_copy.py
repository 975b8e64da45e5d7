"""A memory of the served model itself is a copy: bit for bit in the blocks, and in what is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import awareness, captured
from safetensors.torch import load_file

from awareness_vllm.packages.file import read

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_blocks_hold_the_captured_bits(
    models: dict[str, Path], name: str, document: Callable[[int, int], str], tmp_path: Path
) -> None:
    memory = captured(models[name], document(300, 2), tmp_path / "store", "--engine", "vllm")
    package = read(tmp_path / "store" / f"{memory}.safetensors")
    out = tmp_path / "blocks.safetensors"
    script = Path(__file__).with_name("read_blocks.py")
    done = subprocess.run(
        [sys.executable, script, models[name], tmp_path / "store" / f"{memory}.safetensors", out],
        capture_output=True,
        text=True,
    )
    assert out.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    assert f"loaded {memory}: {package.manifest.tokens} tokens" in done.stdout + done.stderr
    blocks = load_file(out)
    for i, states in enumerate(zip(package.keys, package.values, strict=True)):
        for part, state in zip(("key", "value"), states, strict=True):
            held = blocks[f"layers.{i}.{part}"][: package.manifest.tokens]
            assert held.dtype == state.dtype == torch.bfloat16
            assert torch.equal(held.view(torch.int16), state.view(torch.int16)), (i, part)


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_captured_by_transformers_is_close(
    models: dict[str, Path], name: str, document: Callable[[int, int], str], tmp_path: Path
) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(document(361, i))
    run = awareness(
        "eval", "--source", models[name], "--target", models[name], "--texts", tmp_path,
        "--context", 250, "--continuation", 60,
    )  # fmt: skip
    assert run.status == 0, run.stderr[-2000:]
    assert run.out["n"] == 4
    assert run.out["conditions"]["memory"]["kl"] <= 1e-3, run.out
