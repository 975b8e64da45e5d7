"""Real models, real W-Matrices and real servers: one server per module."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.models import prepare
from awareness_demo.wmatrices import is_readable, shipped
from filelock import FileLock
from harness import CLI, captured

from awareness_vllm.anchors.corpus import load
from awareness_vllm.files import anchors_dir, home
from awareness_vllm.models.tokens import load_tokenizer, tokenize

SMALL = ("--tokens", 8000, "--layers", 6, "--rank", 256, "--calibration", 32)
"""A fit of two minutes on two cores instead of eight. Its memories are worth far more than their
tokens; how much they keep is for the full fit to say."""


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
    """SmolLM2 → Gemma-3 as it is shipped; where none is for these models, by a small fit."""
    return shipped(smollm2, gemma3) or small(smollm2, gemma3)


@pytest.fixture(scope="session")
def small_wmatrix(smollm2: Path, gemma3: Path) -> Path:
    """SmolLM2 → Gemma-3 by a small fit, kept for the next run."""
    return small(smollm2, gemma3)


@pytest.fixture(scope="session")
def full_wmatrix(smollm2: Path, gemma3: Path) -> Path:
    """SmolLM2 → Gemma-3 by the default fit, kept for the next run."""
    return fitted(smollm2, gemma3, home() / "tests" / "default.wmatrix")


def small(source: Path, target: Path) -> Path:
    recipe = "".join(str(word).replace("--", "-") for word in SMALL)
    return fitted(source, target, home() / "tests" / f"small{recipe}.wmatrix", SMALL)


def fitted(source: Path, target: Path, path: Path, flags: tuple[object, ...] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # of several processes of tests, one fits
        if not is_readable(path):
            install()
            command = [*CLI, "fit", "--source", source, "--target", target, *flags]
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


@pytest.fixture(scope="session")
def own_memories(
    models: dict[str, Path],
    document: Callable[[int, int], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, str]]:
    """A memory of each model, captured by vLLM itself, and its text."""
    texts = {"smollm2-135m": document(400, 1), "gemma3-270m": document(300, 2)}

    def own(name: str) -> tuple[Path, str]:
        store = tmp_path_factory.mktemp(name) / "store"
        memory = captured(models[name], texts[name], store, "--engine", "vllm")
        return store / f"{memory}.safetensors", texts[name]

    with ThreadPoolExecutor() as pool:  # an engine's start keeps one core busy
        return dict(zip(texts, pool.map(own, texts), strict=True))
