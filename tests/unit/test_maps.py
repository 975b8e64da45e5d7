"""The maps in `maps/`, and where the demo puts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from awareness_demo.wmatrices import MAPS, name_of, provide, shipped
from tokenizers import Tokenizer

from awareness_vllm.files import file_digest, wmatrices_dir
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_manifest

pytestmark = pytest.mark.unit

MEGABYTE = 1_000_000
SHIPPED = sorted(MAPS.glob("*.wmatrix"))
Models = tuple[Path, Path]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_map_is_small_certified_and_named_with_its_digest(path: Path) -> None:
    assert path.stat().st_size <= 12 * MEGABYTE
    wmatrix = load(path)
    assert wmatrix.manifest.quantization == "int8"
    assert wmatrix.manifest.measured is not None
    assert file_digest(path) in (MAPS / "README.md").read_text()


@pytest.fixture(scope="module")
def maps(tiny_models: Models, fitted: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the map between two models."""
    folder = tmp_path_factory.mktemp("shipped")
    fitted.save(folder / name_of(*tiny_models))
    return folder


@pytest.fixture
def place(tiny_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a home has the map of the pair."""
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    return wmatrices_dir() / name_of(*tiny_models)


def test_the_shipped_map_is_linked_into_the_home(
    tiny_models: Models, maps: Path, place: Path
) -> None:
    place.parent.mkdir()
    place.symlink_to(place.parent / "gone.wmatrix")
    assert provide(*tiny_models, maps) == place
    assert place.resolve() == (maps / place.name).resolve()
    assert load(place).manifest.rank == 4


def test_a_map_of_ones_own_stays(tiny_models: Models, maps: Path, place: Path) -> None:
    load(maps / place.name).to_int8().save(place)
    assert provide(*tiny_models, maps) == place
    assert not place.is_symlink()


def test_a_map_for_other_weights_is_not_taken(
    tiny_models: Models,
    maps: Path,
    place: Path,
    make_model: Callable[..., Path],
    byte_fallback_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    other = make_model(tmp_path / "target", byte_fallback_tokenizer, 48, 2, 3)
    assert name_of(tiny_models[0], other) == place.name
    assert shipped(tiny_models[0], other, maps) is None
    assert provide(tiny_models[0], other, maps) is None
    assert shipped(*tiny_models, maps / "none") is None


def test_shipped_maps_lead_between_the_models_of_the_readme() -> None:
    readme = (MAPS / "README.md").read_text()
    for path in SHIPPED:
        manifest = read_manifest(path)
        for model in (manifest.source, manifest.target):
            assert f"| {model.name} | `{model.weights}` | `{model.tokenizer}` |" in readme
