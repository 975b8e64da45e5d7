"""What a window has lost is mapped from the layers that hold it, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from awareness_vllm.align.realign import copy, realign
from awareness_vllm.errors import PackageCorrupt, UnsupportedModel, UnsupportedRequest
from awareness_vllm.fit.layers import full_layers
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.file import Package, build, publish, read, verify
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox"


def embed(ids: Tensor) -> Tensor:
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(3))[ids]


@pytest.fixture(scope="module")
def whole(make_package: Callable[..., Package]) -> Package:
    return make_package(TEXT)


@pytest.fixture(scope="module")
def cropped(whole: Package) -> Package:
    """As transformers' default cache has it: the layer with a window of 4 keeps 3 tokens."""
    return build(
        geometry=whole.geometry,
        text=TEXT,
        tokens=whole.tokens,
        spans=whole.spans,
        keys=[whole.keys[0], whole.keys[1][-3:]],
        values=[whole.values[0], whole.values[1][-3:]],
        engine="transformers",
        versions={},
    )


@pytest.fixture(scope="module")
def full_map(wmatrix: WMatrix, geometry: Geometry) -> WMatrix:
    """The tiny map without the features of the layer that has a window."""
    first = geometry.layers[0].width
    total = geometry.key_width
    columns = torch.cat((torch.arange(first), total + torch.arange(first)))
    columns = torch.cat((columns, torch.arange(2 * total, len(wmatrix.mean))))
    manifest = wmatrix.manifest.model_copy(update={"layers": (0,)})
    parts = {name: getattr(wmatrix, name)[columns] for name in ("mean", "scale", "encode")}
    return replace(wmatrix, manifest=manifest, **parts)


def test_a_cropped_package_has_its_first_tokens_and_can_be_read(
    cropped: Package, tmp_path: Path
) -> None:
    result = verify(publish(cropped, tmp_path))
    assert result.manifest.first_tokens == (0, len(TEXT) - 3)
    assert torch.equal(result.keys[1], cropped.keys[1])


def test_a_whole_package_has_no_first_tokens(whole: Package) -> None:
    assert "first_tokens" not in whole.manifest.model_dump_json()


@pytest.mark.parametrize("first_tokens", [(0,), (0, 1)])
def test_first_tokens_that_contradict_the_states_are_refused(
    cropped: Package, first_tokens: tuple[int, ...], tmp_path: Path
) -> None:
    manifest = cropped.manifest.model_copy(update={"first_tokens": first_tokens})
    with pytest.raises(PackageCorrupt):
        read(publish(replace(cropped, manifest=manifest), tmp_path))


def test_maps_that_read_lost_states_are_refused(
    cropped: Package, wmatrix: WMatrix, folder: Path
) -> None:
    with pytest.raises(UnsupportedRequest, match="layers \\[1\\]"):
        copy(cropped)
    with pytest.raises(UnsupportedRequest, match="--choice full"):
        realign(cropped, wmatrix, folder, embed, dtype=torch.float32)


def test_a_map_of_the_full_layers_gives_all_states(
    cropped: Package, whole: Package, full_map: WMatrix, folder: Path
) -> None:
    result = realign(cropped, full_map, folder, embed, dtype=torch.float32)
    expected = realign(whole, full_map, folder, embed, dtype=torch.float32)
    for one, other in zip(result.keys, expected.keys, strict=True):
        assert torch.equal(one, other)


def test_layers_without_a_window_are_chosen(geometry: Geometry) -> None:
    full, sliding = geometry.layers
    mixed = geometry.model_copy(update={"layers": (sliding, full, sliding, full, full, full)})
    assert full_layers(2, mixed) == (3, 5)
    assert full_layers(None, geometry) == (0,)


def test_without_a_full_layer_there_is_an_error(geometry: Geometry) -> None:
    everywhere = geometry.model_copy(update={"layers": geometry.layers[1:]})
    with pytest.raises(UnsupportedModel, match=r"windows of \[4\]"):
        full_layers(None, everywhere)
