"""Realignment: a copy for the same model, the map for another, at the target's positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from awareness_vllm.align.realign import AlignedMemory, copy, prompt_ids, realign
from awareness_vllm.models.rope import unrotate
from awareness_vllm.models.tokens import align, tokenize
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.features import embedding_features, flat_states
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "🦊 the quick brown fox, naïve dogs"  # its first byte is a target token of its own
SINK = 2


@pytest.fixture(scope="module")
def package(make_package: Callable[..., Package]) -> Package:
    return make_package(TEXT)


def embed(ids: Tensor) -> Tensor:
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(3))[ids]


@pytest.fixture(scope="module")
def aligned(package: Package, wmatrix: WMatrix, folder: Path) -> AlignedMemory:
    return realign(package, wmatrix, folder, embed, dtype=torch.float32)


def test_copy_is_the_identity(package: Package) -> None:
    memory = copy(package)
    assert memory.ids == package.tokens
    for one, other in zip(memory.keys + memory.values, package.keys + package.values, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_bytes_counts_keys_and_values(package: Package) -> None:
    assert copy(package).bytes == len(package.tokens) * package.geometry.width * 2


def test_the_sink_comes_first_and_is_the_targets_own(
    aligned: AlignedMemory, wmatrix: WMatrix, folder: Path, byte_fallback_tokenizer: Tokenizer
) -> None:
    ids = tokenize(byte_fallback_tokenizer, TEXT).ids
    assert aligned.ids == [*wmatrix.manifest.sink, *ids]
    assert aligned.ids == prompt_ids(TEXT, wmatrix.manifest.sink, folder)
    for i, layer in enumerate(wmatrix.manifest.target.layers):
        for states, sink in (
            (aligned.keys, wmatrix.sink_keys),
            (aligned.values, wmatrix.sink_values),
        ):
            assert states[i].shape == (len(aligned.ids), layer.heads, layer.head_dim)
            assert torch.equal(states[i][:SINK], sink[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cache_has_the_dtype_asked_for(
    package: Package, wmatrix: WMatrix, folder: Path, aligned: AlignedMemory, dtype: torch.dtype
) -> None:
    memory = realign(package, wmatrix, folder, embed, dtype=dtype)
    for one, other in zip(memory.keys + memory.values, aligned.keys + aligned.values, strict=True):
        assert one.dtype == dtype
        assert torch.equal(one, other.to(dtype))


def mapped(package: Package, wmatrix: WMatrix, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The map by hand: each target token's last byte is the source token (its tokens are bytes)."""
    spans = tokenize(Tokenizer.from_file(str(folder / "tokenizer.json")), TEXT).spans
    last = torch.tensor(spans[:, 1] - 1)
    assert torch.equal(last, torch.from_numpy(align(package.spans, spans)))
    assert last[0] == 0
    flat = flat_states(package.geometry, package.keys, package.values)[last]
    ids = prompt_ids(TEXT, wmatrix.manifest.sink, folder)
    embeddings = embedding_features(embed, ids, SINK, wmatrix.manifest.predecessors)
    return wmatrix.map(flat, embeddings, last == 0)


def test_keys_are_rotated_to_the_positions_behind_the_sink(
    aligned: AlignedMemory, package: Package, wmatrix: WMatrix, folder: Path
) -> None:
    keys, values = mapped(package, wmatrix, folder)
    positions = torch.arange(SINK, len(aligned.ids))
    for i, layer in enumerate(wmatrix.manifest.target.layers):
        free = unrotate(aligned.keys[i][SINK:], positions, layer.positions)
        torch.testing.assert_close(free, keys[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(aligned.values[i][SINK:], values[i], atol=1e-5, rtol=1e-5)


def changed(package: Package, token: int) -> Package:
    """The package with other states at one source token."""
    keys, values = ([s.clone() for s in states] for states in (package.keys, package.values))
    for state in (*keys, *values):
        state[token] += 1
    return replace(package, keys=keys, values=values)


def test_the_sources_first_position_is_masked(
    aligned: AlignedMemory, package: Package, wmatrix: WMatrix, folder: Path
) -> None:
    first = realign(changed(package, 0), wmatrix, folder, embed, dtype=torch.float32)
    last = realign(changed(package, -1), wmatrix, folder, embed, dtype=torch.float32)
    for one, same, other in zip(aligned.values, first.values, last.values, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one[:-1], other[:-1])
        assert not torch.allclose(one[-1], other[-1])


def test_masked_states_do_not_matter(package: Package, wmatrix: WMatrix, folder: Path) -> None:
    one, other = (
        realign(p, wmatrix, folder, embed, dtype=torch.float32, masked=True)
        for p in (package, changed(package, -1))
    )
    for a, b in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert torch.equal(a, b)
