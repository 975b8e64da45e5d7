"""Maps of a registry at the start of a server: named ones, and those for models that have none."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hostile_registry import hostile_registry
from memories_server import Make, certificate_with
from random_maps import random_map
from registry_server import RegistryServer

from awareness_vllm.cli.main import main
from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput
from awareness_vllm.marketplace.files import artefact_of, push_file
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.file import publish
from awareness_vllm.serving import remote_maps
from awareness_vllm.serving.launch import serving_config
from awareness_vllm.serving.remote_maps import with_registry_maps
from awareness_vllm.trust.signing import keygen
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


def test_a_registry_that_does_not_end_holds_no_start_up(
    learned: WMatrix,
    tiny_models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    empty_home: Path,
) -> None:
    monkeypatch.setattr(remote_maps, "MAPS_S", 0.3)
    push(learned, tmp_path / "a.wmatrix", str(tmp_path / "layout"), 0.7)
    over = threading.Event()
    with hostile_registry(artefact_of(tmp_path / "a.wmatrix"), "a") as hostile:
        # Its tags come at once; what each of them names is looked up by threads of the index.
        hostile.odd["tags/list"] = lambda request: request.answer(b'{"tags": ["a", "b"]}')
        hostile.odd["manifests"] = lambda request: over.wait(10)
        config, begin = serving_config(registry=hostile.reference), time.monotonic()
        assert with_registry_maps(config, str(tiny_models[1])) == config
        assert 0.3 <= time.monotonic() - begin < 3
        over.set()


def test_maps_that_nobody_trusts_take_no_place(
    learned: WMatrix,
    tiny_models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    empty_home: Path,
) -> None:
    """A stranger's, from another model each, are listed as the best."""
    monkeypatch.setattr(remote_maps, "MAX_MAPS", 1)
    where, key = str(tmp_path / "layout"), keygen(tmp_path / "alice")
    entry = {"public_key": "alice.pub", "roles": ["wmatrix", "certificate"]}
    (tmp_path / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    for i in range(3):
        source = replace_weights(learned.manifest.source, i)
        manifest = learned.manifest.model_copy(update={"source": source})
        push(replace(learned, manifest=manifest), tmp_path / f"{i}.wmatrix", where, 0.99)
    path = tmp_path / "ours.wmatrix"
    manifest = learned.manifest.model_copy(update={"certificate": certificate_with(0.6)})
    replace(learned, manifest=manifest).save(path)
    for what in ([], ["--certificate"]):
        assert main(["sign", str(path), "--key", str(key.private), *what]) == 0
    push_file(path, open_repository(where))
    config = serving_config(registry=where, trust=tmp_path / "trust.json")
    (pulled,) = with_registry_maps(config, str(tiny_models[1])).wmatrices
    assert Path(pulled).read_bytes() == path.read_bytes()


def replace_weights(geometry: Geometry, number: int) -> Geometry:
    """The geometry of another model."""
    return geometry.model_copy(update={"name": f"other-{number}", "weights": f"{number:064x}"})


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
