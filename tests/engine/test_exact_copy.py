"""A memory of the served model itself is a copy: bit for bit in the blocks, and in what is said."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import awareness
from safetensors.torch import load_file

from awareness_vllm.packages.file import read
from awareness_vllm.packages.manifest import read_manifest

pytestmark = pytest.mark.engine


NAMES = ["smollm2-135m", "gemma3-270m"]


@pytest.fixture(scope="module")
def blocks(
    models: dict[str, Path],
    own_memories: dict[str, tuple[Path, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], dict[str, torch.Tensor]]:
    """A function from a model's name to what its engine's blocks hold of its own memory."""
    folder = tmp_path_factory.mktemp("blocks")
    words: list[object] = [sys.executable, Path(__file__).with_name("read_blocks.py")]
    for name in NAMES:
        words += [models[name], own_memories[name][0], folder / f"{name}.safetensors"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    said = done.stdout + done.stderr

    def held(name: str) -> dict[str, torch.Tensor]:
        out, package = folder / f"{name}.safetensors", own_memories[name][0]
        assert out.is_file(), said[-4000:]
        assert f"loaded {package.stem}: {read_manifest(package).tokens} tokens" in said
        return load_file(out)

    return held


@pytest.mark.parametrize("name", NAMES)
def test_blocks_hold_the_captured_bits(
    own_memories: dict[str, tuple[Path, str]],
    blocks: Callable[[str], dict[str, torch.Tensor]],
    name: str,
) -> None:
    package, found = read(own_memories[name][0]), blocks(name)
    for i, states in enumerate(zip(package.keys, package.values, strict=True)):
        for part, state in zip(("key", "value"), states, strict=True):
            held = found[f"layers.{i}.{part}"][: package.manifest.tokens]
            assert held.dtype == state.dtype == torch.bfloat16
            assert torch.equal(held.view(torch.int16), state.view(torch.int16)), (i, part)


@pytest.mark.parametrize("name", NAMES)
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
