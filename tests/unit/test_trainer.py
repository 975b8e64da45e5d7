"""The trainer and its names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awareness_demo.sources import ANCHORS, DOMAINS

from awareness_vllm.errors import BadInput
from awareness_vllm.fit import gather
from awareness_vllm.fit.trainer import WMatrixTrainer, domain_folders
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit


@pytest.mark.slow
def test_train_save_register(
    tiny_models: tuple[Path, Path],
    anchors: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    for document in anchors:
        (tmp_path / f"{document.name}.txt").write_text(document.text)
    trainer = WMatrixTrainer(*tiny_models).configure(
        num_anchors=1000, anchors=[tmp_path], layers="all", rank=4, calibration=2
    )
    wmatrix = trainer.train(epochs=1, validation_split=0.3, progress=False)
    assert wmatrix.manifest.layers == (0, 1, 2, 3)
    assert wmatrix.manifest.anchors.tokens >= 1000
    assert wmatrix.manifest.fit["held_out"] == 0.3
    assert wmatrix.accuracy < 1
    assert 0 < wmatrix.reconstruction_error < 1
    path = wmatrix.register(name="tiny")
    assert path == tmp_path / "home" / "wmatrices" / "tiny.wmatrix"
    assert torch.equal(load(path).encode, wmatrix.encode)


def test_names_are_not_paths(wmatrix: WMatrix) -> None:
    with pytest.raises(BadInput, match="name"):
        wmatrix.register("../elsewhere")


def test_unsupported_settings_are_refused(tiny_models: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="optimization"):
        WMatrixTrainer(*tiny_models).configure(optimization="adam")
    with pytest.raises(BadInput, match="exclude"):
        WMatrixTrainer(*tiny_models).configure(anchors=["x"], anchor_domains=["code"])
    with pytest.raises(BadInput, match="poetry"):
        WMatrixTrainer(*tiny_models).configure(anchor_domains=["poetry"]).documents()


def test_every_source_belongs_to_one_domain() -> None:
    sources = [source for domain in DOMAINS.values() for source in domain]
    assert len(sources) == len(set(sources))
    assert {source.name for source in ANCHORS} <= set(sources)


def test_a_domain_is_a_row_of_the_table_or_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    (tmp_path / "anchors" / "ours").mkdir(parents=True)
    (tmp_path / "anchors" / "domains.json").write_text('{"code": ["python", "perl"]}')
    names = [folder.name for folder in domain_folders(["ours", "code"])]
    assert names == ["ours", "python", "perl"]
    with pytest.raises(BadInput, match="code, ours"):
        domain_folders(["poetry"])
