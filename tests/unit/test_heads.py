"""Which source heads a map listens to, and the command that prints and draws it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from awareness_vllm.cli.main import main
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.heads import (
    Head,
    head_mapping_summary,
    head_shares,
    layer_correspondence,
)

pytestmark = pytest.mark.unit


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
    found = {row.target: row for row in head_mapping_summary(planted, top=1)}
    row = found[Head("key", 2, 0)]
    assert row.shares == ((Head("value", 1, 0), pytest.approx(1.0)),)
    assert row.tokens == 0
    assert found[Head("key", 0, 0)].tokens == pytest.approx(1.0)


def test_layers_correspond(wmatrix: WMatrix) -> None:
    table = layer_correspondence(wmatrix)
    assert table.shape == (3, 2)
    torch.testing.assert_close(table.sum(1), torch.ones(3))


def test_heads_prints_and_draws(
    wmatrix: WMatrix, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, html = tmp_path / "a.wmatrix", tmp_path / "a.html"
    wmatrix.save(path)
    assert main(["heads", str(path), "--top", "2", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["source"], found["target"], found["html"]) == ("tiny", "target", None)
    assert [row["target"] for row in found["heads"][:2]] == [
        "layer 0 head 0 key",
        "layer 1 head 0 key",
    ]
    assert all(len(row["sources"]) == 2 for row in found["heads"])
    assert main(["heads", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "target ← tiny, shares of the map's weight"
    assert lines[1].startswith("layer 0 head 0 key")
    assert "(tokens " in lines[1]
    assert main(["heads", str(path), "--html", str(html)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == str(html)
    assert "Share of each head of tiny in each head of target" in html.read_text()


def test_the_heat_map_holds_every_share(wmatrix: WMatrix) -> None:
    rows = head_mapping_summary(wmatrix, top=2**31)
    table = head_shares(wmatrix)
    assert table.shares.shape == (6, 6)
    assert table.down == tuple(row.target for row in rows)
    tokens = [row.tokens for row in rows]
    assert table.shares.sum(1) + tokens == pytest.approx(1)
    strongest, share = rows[2].shares[0]
    assert table.shares[2, table.across.index(strongest)] == share
