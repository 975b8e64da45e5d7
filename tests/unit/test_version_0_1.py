"""Files that version 0.1 wrote are read by this one: fields and tensors have other names since."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from awareness_vllm.packages.file import read, verify
from awareness_vllm.packages.store import digest_in
from awareness_vllm.wmatrix.file import load

pytestmark = pytest.mark.unit

FILES = Path(__file__).parents[1] / "data" / "v0.1"
MEMORY = FILES / "mem_9c6b6f5619f87e69bac31278636770bd.safetensors"
WMATRIX = FILES / "pair.wmatrix"


def test_a_package_is_whole_and_says_what_its_window_lost() -> None:
    assert read(MEMORY, digest=digest_in(MEMORY.stem)).text == "hello"
    package = verify(MEMORY)
    assert package.text == "hello"
    assert package.manifest.first_tokens == (0, 2)
    assert [len(key) for key in package.keys] == [5, 3]


def test_a_wmatrix_is_whole_and_its_certificate_certifies() -> None:
    manifest = load(WMATRIX).manifest
    first, second = (layer.positions for layer in manifest.target.layers)
    assert (first.beta_slow, first.beta_fast, first.original) == (1.0, 4.0, 16)
    assert (first.interleaved, second.interleaved) == (False, True)
    assert manifest.position_embeddings == ("source",)
    assert manifest.measured is not None
    assert manifest.measured.retention.mean == 0.9


def test_it_maps_as_it_did() -> None:
    wmatrix = load(WMATRIX)
    width = wmatrix.manifest.source_width
    source = torch.linspace(-1, 1, 2 * width).view(2, width)
    embeddings = torch.linspace(1, -1, 2 * wmatrix.manifest.embedding_width).view(2, -1)
    keys, values = wmatrix.map(source, embeddings)
    sums = [round(state.sum().item(), 3) for state in (*keys, *values)]
    assert sums == [153.218, -40.395, 84.678, -28.723]
    assert wmatrix.position_latents().keys() == {"source"}


def test_its_files_are_saved_with_todays_names(tmp_path: Path) -> None:
    load(WMATRIX).save(tmp_path / "pair.wmatrix")
    raw = (tmp_path / "pair.wmatrix").read_bytes()
    assert not any(name in raw for name in (b"woven", b"places", b'\\"slow', b'\\"fast'))
    new, old = load(tmp_path / "pair.wmatrix"), load(WMATRIX)
    assert new.manifest.model_copy(update={"payload": ""}) == old.manifest.model_copy(
        update={"payload": ""}
    )
    assert torch.equal(new.position_embeddings["source"], old.position_embeddings["source"])
    assert read(MEMORY).manifest.model_dump_json().count("first_tokens") == 1
