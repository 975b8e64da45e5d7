"""The catalogue: what of a registry and of this machine is in it, and that its page is safe."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import samples

from awareness_vllm.cli.main import main
from awareness_vllm.compatibility import catalogue as module
from awareness_vllm.compatibility.catalogue import of_listings
from awareness_vllm.compatibility.html.page import page
from awareness_vllm.marketplace.files import artefact_of, listing_in, push_file
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import Reference
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import read_manifest

pytestmark = pytest.mark.unit
REFERENCE = Reference.parse("oci://registry.example.com/a/b")


def data_of(html: str) -> dict[str, Any]:
    """The page's data, as its script reads them."""
    found = re.search('<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def test_the_page_is_one_safe_document() -> None:
    catalogue = samples.catalogue()
    html = page(catalogue=catalogue)
    assert samples.HOSTILE not in html
    assert "<img" not in html
    assert not re.search(r"https?://|@import|url\(|innerHTML", html)
    assert data_of(html) == json.loads(json.dumps(catalogue.document))
    assert samples.HOSTILE in data_of(html)["models"]
    # The one script that the policy lets run is the one that is there.
    (script,) = re.findall("<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert f"script-src 'sha256-{digest}'" in html


def test_certificates_that_were_only_listed_are_claims() -> None:
    catalogue = samples.catalogue()
    certified, other = catalogue.document["maps"]
    assert certified[8]["claimed"]
    measured = read_manifest(samples.MAP).measured
    assert measured is not None
    assert certified[8]["retention"][0] == round(measured.retention.mean, 4)
    assert len(certified[8]["plans"]) == len(measured.plans)
    assert other[8] is None
    assert catalogue.matrix is not None
    kinds = {cell.basis.kind for cell in catalogue.matrix.cells if cell.basis}
    assert kinds == {"claimed"}


def test_each_file_is_listed_once_and_models_of_one_name_are_told_apart(
    make_package: Callable[..., Package], tmp_path: Path
) -> None:
    listing = listing_in(artefact_of(publish(make_package(), tmp_path)))
    geometry = listing.manifest.geometry.model_copy(update={"weights": "e" * 64})
    manifest = listing.manifest.model_copy(update={"geometry": geometry})
    other = listing.model_copy(update={"digest": "f" * 64, "manifest": manifest})
    catalogue = of_listings([listing, other, listing], REFERENCE)
    assert catalogue.memories == 2
    names = catalogue.document["models"]
    assert len(set(names)) == 2
    assert all(name.startswith("tiny (") for name in names)
    pull = catalogue.document["commands"]["memory"]
    assert pull == ("awareness pull oci://registry.example.com/a/b:", "")


def test_a_registrys_catalogue_reads_its_listings_alone(
    make_package: Callable[..., Package],
    wmatrix: WMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    path = publish(make_package(), tmp_path / "store")
    (tmp_path / "wmatrices").mkdir()
    wmatrix.save(tmp_path / "wmatrices/a.wmatrix")
    (tmp_path / "store" / f"mem_{'0' * 32}.safetensors").write_bytes(b"no package")
    repository = open_repository(tmp_path / "layout")
    for file in (path, tmp_path / "wmatrices/a.wmatrix"):
        listing, _ = push_file(file, repository, tags=[file.stem[:8]])
        (tmp_path / "layout/blobs/sha256" / listing.digest).unlink()
    for argv, found in (
        (["--registry", str(tmp_path / "layout")], (1, 1, 0)),
        ([], (1, 1, 1)),
    ):
        html = tmp_path / "page.html"
        assert main(["catalogue", "--html", str(html), *argv, "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["memories"], result["wmatrices"], result["skipped"]) == found
        data = data_of(html.read_text())
        assert data["memories"][0][0] == path.stem
        before, after = data["commands"]["map"]
        assert main([*(before + data["maps"][0][0] + after).split()[1:], "--json"]) == (
            1 if argv else 0  # the layout's file is gone: it is not what was read
        )
        capsys.readouterr()


def test_a_matrix_that_nobody_could_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "source \\ target" in page(catalogue=samples.catalogue())
    monkeypatch.setattr(module, "MOST_CELLS", 1)
    html = page(catalogue=samples.catalogue())
    assert "source \\ target" not in html
    assert "too many pairs" in html
