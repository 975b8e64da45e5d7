"""The trainer by its published names, and the head mapping of a map."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from awareness_demo.sources import ANCHORS, DOMAINS

from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.fit import gather
from awareness_vllm.fit.trainer import WMatrixTrainer, domain_folders
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.heads import Head, head_mapping_summary, heads, layer_correspondence
from awareness_vllm.wmatrix.heat_map import shares

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
    with pytest.raises(UnsupportedModel, match="endpoint"):
        WMatrixTrainer(*tiny_models, source_endpoint="http://localhost:1")
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


def test_a_planted_head_is_found(wmatrix: WMatrix) -> None:
    """Only the source's layer 1 value reaches the target's layer 2 key."""
    width = wmatrix.manifest.source_width
    encode, decode = torch.zeros_like(wmatrix.encode), torch.zeros_like(wmatrix.decode)
    # Source: keys 8 + 8 wide, values 8 + 8; target: keys 4 + 4 + 4 wide, then values.
    encode[24:32, 0] = 1.0
    decode[0, 8:12] = 1.0
    encode[width:, 1] = 1.0
    decode[1, 0:4] = 1.0
    planted = replace(wmatrix, encode=encode, decode=decode)
    result = {row.target: row for row in head_mapping_summary(planted, top=1)}
    row = result[Head("key", 2, 0)]
    assert row.shares == ((Head("value", 1, 0), pytest.approx(1.0)),)
    assert row.tokens == 0
    assert result[Head("key", 0, 0)].tokens == pytest.approx(1.0)


def test_layers_correspond(wmatrix: WMatrix) -> None:
    table = layer_correspondence(wmatrix)
    assert table.shape == (3, 2)
    torch.testing.assert_close(table.sum(1), torch.ones(3))


def test_heads_prints_and_draws(
    wmatrix: WMatrix,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, plot = tmp_path / "a.wmatrix", tmp_path / "a.png"
    wmatrix.save(path)
    assert main(["heads", str(path), "--top", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert (result["source"], result["target"], result["plot"]) == ("tiny", "target", None)
    assert [row["target"] for row in result["heads"][:2]] == [
        "layer 0 head 0 key",
        "layer 1 head 0 key",
    ]
    assert all(len(row["sources"]) == 2 for row in result["heads"])
    assert main(["heads", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "target ← tiny, shares of the map's weight"
    assert lines[1].startswith("layer 0 head 0 key")
    assert "(tokens " in lines[1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["heads", str(path), "--plot", str(plot), "--json"]) == 1
    assert "awareness-vllm[bench]" in json.loads(capfd.readouterr().out)["error"]["remedy"]
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert main(["heads", str(path), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_heat_map_holds_every_share(wmatrix: WMatrix) -> None:
    rows = head_mapping_summary(wmatrix, top=2**31)
    across = [head for head, _ in heads(wmatrix.manifest.source, wmatrix.manifest.layers)]
    result = shares(rows, across)
    assert result.shape == (6, 6)
    tokens = [row.tokens for row in rows]
    assert result.sum(1) + tokens == pytest.approx(1)
    assert result[2, across.index(rows[2].shares[0][0])] == rows[2].shares[0][1]
