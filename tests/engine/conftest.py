"""Real models, a real W-Matrix and real servers: one server per module."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.models import prepare
from harness import CLI

from awareness_vllm.anchors.corpus import load
from awareness_vllm.files import anchors_dir, wmatrices_dir
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.wmatrix.manifest import is_readable


@pytest.fixture(scope="session")
def models() -> dict[str, Path]:
    return prepare()


@pytest.fixture(scope="session")
def smollm2(models: dict[str, Path]) -> Path:
    return models["smollm2-135m"]


@pytest.fixture(scope="session")
def gemma3(models: dict[str, Path]) -> Path:
    return models["gemma3-270m"]


@pytest.fixture(scope="session")
def wmatrix(smollm2: Path, gemma3: Path) -> Path:
    """SmolLM2 → Gemma-3, fitted with the defaults unless `make demo` has done so."""
    path = wmatrices_dir() / "smollm2-135m--gemma3-270m.wmatrix"
    if not is_readable(path):
        install()
        command = [*CLI, "fit", "--source", smollm2, "--target", gemma3]
        command += ["--anchors", anchors_dir(), "--out", path]
        subprocess.run(list(map(str, command)), check=True)
    return path


@pytest.fixture(scope="session")
def document(gemma3: Path) -> Callable[[int, int], str]:
    """A function `(tokens, number) -> text`: stretches of a real document in no anchor."""
    install()
    text = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    spans = tokenize(load_tokenizer(str(gemma3)), text).spans

    def stretch(tokens: int, number: int = 0) -> str:
        begin, end = spans[tokens * number, 0], spans[tokens * (number + 1), 0]
        return text.encode()[begin:end].decode()

    return stretch
