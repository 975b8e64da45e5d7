"""What a memory resolves to: a copy, or a map whose last tokens are left to the target."""

from __future__ import annotations

from pathlib import Path

import pytest

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.memories import Memories
from awareness_vllm.wmatrix import gather
from awareness_vllm.wmatrix.config import FitConfig
from awareness_vllm.wmatrix.fit import fit

pytestmark = pytest.mark.unit

TEXT = "some words or others, and a few more of them"


@pytest.fixture(scope="module")
def wmatrix_file(
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("map") / "pair.wmatrix"
    config = FitConfig(tokens=1000, rank=4, predecessors=0, calibration=0, held_out=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        fit(*tiny_models, anchors, config, progress=False).save(path)
    return path


@pytest.mark.parametrize("tail", [0, 5, 1000])
def test_the_tail_is_the_servers_but_one_token_is_always_loaded(
    tiny_models: tuple[Path, Path], wmatrix_file: Path, tmp_path: Path, tail: int
) -> None:
    path = publish(capture(tiny_models[0], TEXT), tmp_path / "store")
    config = ServingConfig(store=str(tmp_path / "store"), wmatrices=(str(wmatrix_file),), tail=tail)
    memory = Memories(config, str(tiny_models[1]), 1000).resolve(path.stem)
    params = memory.params(None)
    assert params.tokens == len(memory.ids)
    assert params.tail == min(tail, len(memory.ids) - 1)


def test_a_copy_leaves_nothing_to_the_target(
    tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    path = publish(capture(tiny_models[0], TEXT), tmp_path)
    memory = Memories(ServingConfig(store=str(tmp_path)), str(tiny_models[0]), 1000)
    assert memory.resolve(path.stem).params(None).tail == 0
