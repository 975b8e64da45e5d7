"""The fused way into pages gives what the plain way gives, for any slots, beginning and heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_stubs import EMPTY, SIZE, embed, empty_pages, latent_of, paged_map

from awareness_vllm.align.encoding import warm_up
from awareness_vllm.align.paged import Latent, PagedMap, Pages
from awareness_vllm.align.realign import AlignedMemory, realign
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox, naïve dogs"


@pytest.fixture(scope="module")
def package(make_package: Callable[..., Package]) -> Package:
    return make_package(TEXT)


@pytest.fixture(scope="module")
def plain(package: Package, wmatrix: WMatrix, folder: Path) -> AlignedMemory:
    return realign(package, wmatrix, folder, embed, dtype=torch.float32)


@pytest.fixture(scope="module")
def paged(wmatrix: WMatrix) -> PagedMap:
    return paged_map(wmatrix)


@pytest.fixture(scope="module")
def latent(paged: PagedMap, package: Package, folder: Path) -> Latent:
    return latent_of(paged, package, folder, embed)


def test_the_latent_has_the_memorys_ids_and_is_smaller(
    latent: Latent, plain: AlignedMemory, wmatrix: WMatrix
) -> None:
    assert latent.ids == plain.ids
    assert latent.rows.shape == (len(plain.ids) - 2, wmatrix.manifest.rank)
    assert 0 < latent.bytes < plain.bytes


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pages_have_the_states_of_the_reference_and_nothing_else(
    data: st.DataObject, wmatrix: WMatrix, latent: Latent, plain: AlignedMemory
) -> None:
    paged = paged_map(wmatrix, data.draw(st.sampled_from([1, 3, 7, 64])))
    count = len(latent.ids)
    begin = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - begin))
    total = -(-count // SIZE) + 2
    slot_mapping = data.draw(st.permutations(range(total * SIZE)))[:length]
    skipped = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    slot_mapping = torch.tensor(
        [-1 if s else slot for slot, s in zip(slot_mapping, skipped, strict=True)]
    )
    pages = empty_pages(3, total)
    paged.write(latent, pages, [slot_mapping] * 3, begin)
    real = slot_mapping >= 0
    untouched = torch.ones(total * SIZE, dtype=torch.bool)
    untouched[slot_mapping[real]] = False
    for i, page in enumerate(pages):
        for written, states in ((page.keys, plain.keys[i]), (page.values, plain.values[i])):
            flat = written.flatten(0, 1)
            expected = states[begin : begin + length][real]
            torch.testing.assert_close(flat[slot_mapping[real]], expected, rtol=1e-5, atol=1e-5)
            assert (flat[untouched] == EMPTY).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38, 1e9])
def test_states_that_no_model_computes_have_no_latent(
    paged: PagedMap, package: Package, folder: Path, value: float
) -> None:
    values = [states.clone() for states in package.values]
    values[1][:, 0, 3] = value  # not every source token is read
    poisoned = replace(package, values=values)
    with pytest.raises(PackageCorrupt):
        latent_of(paged, poisoned, folder, embed)


def test_stored_numbers_are_divided_by_the_layers_scales(
    paged: PagedMap, latent: Latent, plain: AlignedMemory
) -> None:
    pages = [Pages(p.keys, p.values, 2.0, 0.5) for p in empty_pages(3, 16)]
    slot_mapping = torch.arange(len(latent.ids))
    paged.write(latent, pages, [slot_mapping] * 3, begin=0)
    keys, values = (part.flatten(0, 1)[slot_mapping] for part in (pages[1].keys, pages[1].values))
    torch.testing.assert_close(keys, plain.keys[1] / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, plain.values[1] * 2, rtol=1e-5, atol=1e-5)


def test_a_rank_writes_its_own_layers_and_heads(
    package: Package, wmatrix: WMatrix, folder: Path
) -> None:
    """The map's target seen as one layer of three heads, of which this rank has the last two."""
    target = wmatrix.manifest.target
    wide = target.layers[1].model_copy(update={"heads": 3})
    manifest = wmatrix.manifest.model_copy(
        update={"target": target.model_copy(update={"layers": (target.layers[0], wide)})}
    )
    generator = torch.Generator().manual_seed(1)
    width = manifest.target.width
    whole = WMatrix(
        manifest,
        wmatrix.mean,
        wmatrix.scale,
        wmatrix.encode,
        torch.randn(wmatrix.manifest.rank, width, generator=generator),
        torch.randn(width, generator=generator),
        *([torch.randn(2, heads, 4, generator=generator) for heads in (1, 3)] for _ in range(2)),
    )
    expected = realign(package, whole, folder, embed, dtype=torch.float32)
    rank = PagedMap(whole, {1: slice(1, 3)}, DeviceWorkspace("cpu", 64))
    latent = latent_of(rank, package, folder, embed)
    cache = torch.zeros(16, 2, SIZE, 8)
    page = Pages(*cache.transpose(1, 2).split(4, dim=-1))
    slot_mapping = torch.arange(len(latent.ids))
    rank.write(latent, [page], [slot_mapping], begin=0)
    for written, states in ((page.keys, expected.keys), (page.values, expected.values)):
        result = written.flatten(0, 1)[slot_mapping]
        # States are as large as 120: one rounding of the largest is 1e-5, another head's are not.
        torch.testing.assert_close(result, states[1][:, 1:], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("positions", [4096, 100, 2])
def test_a_warm_up_writes_nothing(wmatrix: WMatrix, positions: int) -> None:
    paged = PagedMap(wmatrix, {i: slice(None) for i in range(3)}, DeviceWorkspace("cpu", positions))
    pages = empty_pages(3, 2)
    warm_up(paged, pages)
    assert all((part == EMPTY).all() for page in pages for part in (page.keys, page.values))
