"""Maps of a registry at the start of a server: named ones, and those for models that have none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from memories_server import Make, certificate_with
from random_maps import random_map
from registry_server import RegistryServer

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput
from awareness_vllm.marketplace.files import push_file
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.file import publish
from awareness_vllm.serving.launch import serving_config
from awareness_vllm.serving.remote_maps import with_registry_maps
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit


@pytest.fixture
def learned(geometry: Geometry, tiny_models: tuple[Path, Path]) -> WMatrix:
    """A map to the second tiny model."""
    return random_map(geometry, geometry_of(tiny_models[1]), rank=5)


def push(wmatrix: WMatrix, path: Path, where: str, retention: float | None = None) -> Path:
    """Push a map, with a certificate or without; its file."""
    certificate = None if retention is None else certificate_with(retention)
    manifest = wmatrix.manifest.model_copy(update={"certificate": certificate})
    replace(wmatrix, manifest=manifest).save(path)
    push_file(path, open_repository(where), tags=[path.stem])
    return path


def test_the_best_certified_map_comes_with_the_registry(
    learned: WMatrix, tiny_models: tuple[Path, Path], tmp_path: Path, empty_home: Path
) -> None:
    where, model = str(tmp_path / "layout"), str(tiny_models[1])
    config = serving_config(registry=where)
    assert with_registry_maps(config, model) == config
    plain = push(learned, tmp_path / "plain.wmatrix", where)
    assert with_registry_maps(config, model) == config  # nobody has measured it
    for retention in (0.5, 0.8, 0.6):
        best = push(learned, tmp_path / f"{retention}.wmatrix", where, retention)
        best = tmp_path / "0.8.wmatrix" if retention > 0.5 else best
        (path,) = with_registry_maps(config, model).wmatrices
        assert Path(path).read_bytes() == best.read_bytes()
    # One that the operator names counts, whatever it is worth; maps to other models do not matter.
    named = serving_config(None, [plain], registry=where)
    assert with_registry_maps(named, model) == named
    assert with_registry_maps(config, str(tiny_models[0])) == config


def test_a_registry_that_is_down_brings_no_map_and_keeps_no_server_from_starting(
    tiny_models: tuple[Path, Path], empty_home: Path
) -> None:
    config = serving_config(registry="oci://127.0.0.1:9/team/memories")
    assert with_registry_maps(config, str(tiny_models[1])) == config


def test_a_map_is_named_by_its_reference(
    learned: WMatrix,
    registry: RegistryServer,
    make_package: Make,
    tmp_path: Path,
    empty_home: Path,
) -> None:
    where = registry.reference("test/maps")
    file = push(learned, tmp_path / "pair.wmatrix", where)
    (path,) = serving_config(None, [f"{where}:pair"]).wmatrices
    assert Path(path).is_absolute()
    assert Path(path).read_bytes() == file.read_bytes()
    with pytest.raises(ArtefactNotFound):
        serving_config(None, [f"{where}:other"])
    with pytest.raises(BadInput, match="names one artefact"):
        serving_config(None, [where])
    push_file(publish(make_package(), tmp_path), open_repository(where), tags=["memory"])
    with pytest.raises(ArtefactCorrupt, match="no W-Matrix"):
        serving_config(None, [f"{where}:memory"])


def test_a_servers_registry_is_a_whole_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert serving_config(registry="layout").registry == str(tmp_path / "layout")
    assert serving_config(registry="oci://host/a/b").registry == "oci://host/a/b"
    for reference in ("oci://host/a/b:tag", "http://host/a", ""):
        with pytest.raises(BadInput, match=r"repository|reference"):
            serving_config(registry=reference)
