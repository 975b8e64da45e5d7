"""`awareness push`, `pull` and `gc`, with a folder and with a real registry."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from awareness_vllm import Marketplace
from awareness_vllm.cli.main import main
from awareness_vllm.errors import ArtefactCorrupt
from awareness_vllm.oci.artefact import MANIFEST
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.repository import Repository
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("empty_home")]
Run = Callable[..., Any]


@pytest.fixture
def run(
    tmp_path: Path,
    empty_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """Runs a subcommand in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, status: int = 0) -> Any:
        capfd.readouterr()
        assert main([*argv, "--json"]) == status
        return json.loads(capfd.readouterr().out)

    return run


@pytest.fixture
def memories(make_package: Callable[..., Package], empty_home: Path) -> list[str]:
    """The IDs of three memories in the store."""
    return [publish(make_package(seed=i), empty_home / "store").stem for i in range(3)]


def test_several_there_and_back(run: Run, repository: Repository, memories: list[str]) -> None:
    where = str(repository.reference)
    pushed = run("push", *memories, where, "--license", "CC0-1.0")["pushed"]
    assert [row["id"] for row in pushed] == memories
    pulled = run("pull", *memories, "--registry", where, "--store", "there")["pulled"]
    assert [Path(row["path"]) for row in pulled] == [
        Path("there") / f"{memory}.safetensors" for memory in memories
    ]
    again = run("pull", pushed[0]["reference"])["pulled"][0]
    assert Path(again["path"]).parent.name == "store"


def test_a_tag_of_ones_own(run: Run, repository: Repository, memories: list[str]) -> None:
    where = str(repository.reference)
    (pushed,) = run("push", memories[0], f"{where}:v1", "--tag", "latest", "--name", "Notes")[
        "pushed"
    ]
    assert (pushed["name"], pushed["tags"]) == ("Notes", [memories[0], "latest", "v1"])
    for tag in ("v1", "latest"):
        assert run("pull", f"{where}:{tag}")["pulled"][0]["id"] == memories[0]


def test_the_default_is_a_folder_of_this_home(
    run: Run, memories: list[str], empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", memories[0], str(empty_home / "registry"))
    assert run("pull", memories[0])["pulled"][0]["id"] == memories[0]
    monkeypatch.setenv("AWARENESS_REGISTRY", "elsewhere")
    assert run("pull", memories[0], status=1)["error"]["type"] == "ArtefactNotFound"


def test_a_layout_s_own_name_is_no_tag(run: Run, memories: list[str]) -> None:
    run("push", memories[0], "folder")
    for command in ("pull", "show"):
        error = run(command, "folder", status=1)["error"]
        assert (error["type"], error["message"]) == (
            "BadInput",
            "folder names no memory and no W-Matrix",
        )


def test_maps_go_to_their_own_folder_and_replace_none(
    run: Run, wmatrix: WMatrix, repository: Repository, empty_home: Path
) -> None:
    wmatrix.save(Path("a.wmatrix"))
    where = str(repository.reference)
    run("push", "a.wmatrix", f"{where}:v1", "--name", "a to b")
    path = Path(run("pull", f"{where}:v1")["pulled"][0]["path"])
    assert path == empty_home / "wmatrices" / "a-to-b.wmatrix"
    path.write_bytes(b"a map of one's own")
    (pulled,) = run("pull", f"{where}:v1")["pulled"]
    assert pulled["path"].endswith(f"a-to-b.{pulled['digest'][:16]}.wmatrix")
    assert path.read_bytes() == b"a map of one's own"
    assert run("pull", f"{where}:v1")["pulled"] == [pulled]


def test_a_long_name_is_cut_to_one_that_a_file_can_have(
    run: Run, wmatrix: WMatrix, empty_home: Path
) -> None:
    wmatrix.save(Path("a.wmatrix"))
    run("push", "a.wmatrix", "folder:v1", "--name", "名" * 200)
    path = Path(run("pull", "folder:v1")["pulled"][0]["path"])
    assert path.is_file()
    assert path.parent == empty_home / "wmatrices"


def test_an_id_is_that_of_what_is_pulled(run: Run, memories: list[str], wmatrix: WMatrix) -> None:
    wmatrix.save(Path("a.wmatrix"))
    folder = open_repository("folder")
    others = {memories[0]: memories[1], "a.wmatrix": f"pair_{'0' * 32}.{'0' * 16}"}
    for what, name in others.items():
        assert run("push", what, "folder", "--tag", name, status=1)["error"]["type"] == "BadInput"
        (pushed,) = run("push", what, "folder")["pushed"]
        folder.put_manifest(folder.manifest(pushed["tags"][0])[1], MANIFEST, name)
        for command in ("pull", "show"):
            error = run(command, name, "--registry", "folder", status=1)["error"]
            assert (error["type"], name in error["message"]) == ("ArtefactCorrupt", True)
        with pytest.raises(ArtefactCorrupt):
            Marketplace("folder").memories.pull(name)


def test_what_can_be_pulled_is_there_though_another_one_fails(
    run: Run, repository: Repository, memories: list[str]
) -> None:
    where = str(repository.reference)
    run("push", memories[0], where)
    argv = ("pull", memories[1], memories[0], "--registry", where, "--store", "there")
    assert run(*argv, status=1)["error"]["type"] == "ArtefactNotFound"
    assert [path.stem for path in Path("there").iterdir()] == [memories[0]]


@pytest.mark.parametrize(
    "argv",
    [
        ("push", "ONE", "TWO", "folder:v1"),
        ("push", "ONE", "TWO", "folder", "--name", "n"),
        ("push", "ONE", f"folder@sha256:{'0' * 64}"),
        ("push", "ONE", "folder", "--tag", "no tag"),
        ("push", "trust.json", "folder"),
        ("pull", "oci://127.0.0.1:1/team/memories"),
        ("pull", "ONE", "--require-signed"),
        ("gc", "--limit-gib", "-1"),
        ("gc", "--limit-gib", "nan"),
    ],
)
def test_what_makes_no_sense(run: Run, memories: list[str], argv: tuple[str, ...]) -> None:
    Path("trust.json").write_text("{}")
    names = {"ONE": memories[0], "TWO": memories[1]}
    error = run(*(names.get(word, word) for word in argv), status=1)["error"]
    assert error["type"] == "BadInput"
    assert not Path("folder").exists()


def test_gc(run: Run, memories: list[str], empty_home: Path) -> None:
    run("push", *memories, "folder")
    run("pull", *memories, "--registry", "folder", "--store", "there")
    assert run("gc", "--limit-gib", "0")["caches"][0]["removed"] == 0  # the store has them, too
    for path in Path("there").iterdir():
        path.unlink()
    served = empty_home / "cache" / "served" / ("0" * 16)
    served.mkdir(parents=True)
    (served / f"{memories[0]}.safetensors").write_bytes(b"a server's")
    assert [cache["removed"] for cache in run("gc")["caches"]] == [0, 0]
    assert [cache["removed"] for cache in run("gc", "--limit-gib", "0")["caches"]] == [3, 1]


def test_people_read_it_too(
    run: Run, memories: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for argv in (["push", memories[0], "folder:v1"], ["pull", "folder:v1"], ["gc"]):
        assert main(argv) == 0
    out = capfd.readouterr().out
    for part in (memories[0], "folder@sha256:", "0 files removed"):
        assert part in out
