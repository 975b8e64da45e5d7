"""Licenses of what is pushed and exported: of SPDX, of the hub, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from awareness_vllm import Marketplace
from awareness_vllm.cli.main import main
from awareness_vllm.errors import BadInput
from awareness_vllm.marketplace.files import artefact_of, find, listing_in
from awareness_vllm.marketplace.hub import export_folder
from awareness_vllm.marketplace.licenses import canonical_license
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.transfer import push
from awareness_vllm.packages import listing as package_listing
from awareness_vllm.packages.file import Package, publish

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]


@pytest.fixture
def memory(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    return publish(make_package(), tmp_path / "store")


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("CC-BY-4.0", "CC-BY-4.0"),
        ("apache-2.0", "Apache-2.0"),
        ("(mit or Apache-2.0) and licenseref-mine", "(MIT OR Apache-2.0) AND LicenseRef-mine"),
        ("GPL-3.0-or-later WITH GCC-exception-3.1", "GPL-3.0-or-later WITH GCC-exception-3.1"),
        ("gemma", "gemma"),
        ("Llama3.1", "llama3.1"),
        ("other", "other"),
    ],
)
def test_what_is_a_license(license: str, expected: str) -> None:
    assert canonical_license(license) == expected


@pytest.mark.parametrize(
    ("license", "remedy"),
    [
        ("Apache 2.0", "apache-2.0"),
        ("MTI", "mit, if that is meant"),
        ("gemma AND MIT", "LicenseRef-NAME"),
        ("free for all", "LicenseRef-NAME"),
        ("MIT\x1b[31m", "LicenseRef-NAME"),
        ("", "LicenseRef-NAME"),
    ],
)
def test_what_is_none_is_refused_before_anything_is_written(
    memory: Path, tmp_path: Path, license: str, remedy: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for argv in (
        ["push", str(memory), str(tmp_path / "layout"), "--license", license],
        ["export", str(memory), "--hf", str(tmp_path / "hub"), "--license", license],
    ):
        assert main([*argv, "--json"]) == 1
        error = json.loads(capfd.readouterr().out)["error"]
        assert (error["type"], remedy in error["remedy"]) == ("BadInput", True)
    with pytest.raises(BadInput, match="SPDX"):
        Marketplace(tmp_path / "layout").memories.publish(memory, license=license)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["store"]


@pytest.mark.parametrize(
    ("license", "on_card", "name"),
    [
        ("apache-2.0", "apache-2.0", None),
        ("gemma", "gemma", None),
        ("GPL-3.0-or-later", "gpl-3.0", None),
        ("mit OR apache-2.0", "other", "MIT OR Apache-2.0"),
    ],
)
def test_a_card_has_the_hubs_name_again(
    memory: Path, tmp_path: Path, license: str, on_card: str, name: str | None
) -> None:
    done = export_folder(memory, tmp_path / "out", license=license)
    assert done.listing.license == canonical_license(license)
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert (data["license"], data.get("license_name")) == (on_card, name)


def test_any_license_that_was_listed_once_is_read(memory: Path, tmp_path: Path) -> None:
    repository = open_repository(tmp_path / "layout")
    artefact = package_listing.artefact_of(memory, license="ask me")
    push(repository, artefact, ("old",))
    assert find(repository, "old")[1].license == "ask me"
    (found,) = Marketplace(tmp_path / "layout").memories.search()
    assert found.license == "ask me"
    assert listing_in(artefact_of(memory, license="mit")).license == "MIT"
