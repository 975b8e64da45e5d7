"""The default anchors and demo models: taken evenly, written at once, verified afterwards."""

from __future__ import annotations

import bz2
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from awareness_demo import anchors as install
from awareness_demo import debian, models, pypi, sources
from awareness_demo.mathematics import EXERCISES, mathematics
from awareness_demo.wikitext import wikitext_to_text

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def awareness_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    return tmp_path


def paragraph(i: int) -> str:
    return "\n".join(f"Line {j} of text {i} says something." for j in range(1000))


def test_every_document_gives_its_share() -> None:
    whole = [Document(f"d{i}", paragraph(i)) for i in range(20)]
    taken = install.take_evenly(whole, 200_000, seed=0)
    assert sum(len(document.text) for document in taken) <= 200_000
    assert len(taken) == 20
    assert all(document.text.startswith("Line ") for document in taken)
    for part, document in zip(taken, whole, strict=True):
        assert part.text in document.text
    assert taken == install.take_evenly(whole, 200_000, seed=0)
    assert taken != install.take_evenly(whole, 200_000, seed=1)


def test_a_small_limit_leaves_documents_out_and_a_large_one_nothing() -> None:
    whole = [Document(f"d{i}", paragraph(i)) for i in range(20)]
    assert 1 <= len(install.take_evenly(whole, 10_000, seed=0)) <= 3
    assert install.take_evenly(whole, 10**9, seed=0) == whole


@pytest.mark.slow
def test_sources_are_installed_once_and_again_when_damaged(
    awareness_home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_packages(package: str, scratch: Path) -> Path:
        raise BadInput(f"cannot get {package}", remedy="apt-get update")

    for name in ("ANCHORS", "HELD_OUT"):
        unreachable = [replace(s, registry=no_packages) for s in getattr(sources, name)]
        monkeypatch.setattr(install, name, unreachable)
    monkeypatch.setattr(install, "FACT_TEXTS", 5)
    lines: list[str] = []
    folders = install.install(progress=lines.append)
    # Without any registry the rest is there, and the warning says what to do.
    made = {"anchors/pydoc-topics", "anchors/facts", "anchors/mathematics", "held-out/facts"}
    assert set(folders) == made
    assert "apt-get update" in caplog.text
    assert len(list(folders["anchors/facts"].glob("*.txt"))) == 5
    assert (folders["held-out/facts"] / "cases.jsonl").read_text().count("\n") == 300
    assert not list(awareness_home.glob("*/.*-*")), "scratch folders are left"

    (folders["anchors/facts"] / "facts-0000.txt").unlink()
    lines.clear()
    install.install(progress=lines.append)
    assert "anchors/pydoc-topics: installed already" in lines
    assert "anchors/facts: installing" in lines
    assert (folders["anchors/facts"] / "facts-0000.txt").is_file()


def test_a_package_that_cannot_be_had_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadInput, match="apt-get update"):
        debian.unpack("no-such-package", tmp_path)


@pytest.mark.slow
def test_a_wheel_that_cannot_be_had_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BadInput, match="make anchors"):
        pypi.unpack("no-such-wheel==1.0", tmp_path)


def test_an_article_becomes_what_a_reader_reads(tmp_path: Path) -> None:
    markup = (
        "{{Infobox|a={{b|c}}}}\n'''Albedo''' is a [[ratio|fraction]]<ref>Smith</ref> of [[light]]."
        "&lt;!-- note --&gt;\n[[File:x.jpg|thumb|A [[cloud]].]]\n"
        "== Ice ==\n* bright [http://x it]\n"
        "{| class=a\n| 1\n|}\n== See also ==\n* [[Sun]]"
    )
    text = "Albedo is a fraction of light.\n\nIce\n- bright it"
    assert wikitext_to_text(markup) == text
    assert wikitext_to_text("open {{ takes the rest") == "open"

    folder = tmp_path / "gensim/test/test_data"
    folder.mkdir(parents=True)
    long = "Albedo matters. " * 200
    page = f"<page><title>A (b)</title><text x='1'>{long}</text></page>"
    page += "<page><title>R</title><text>#REDIRECT</text></page>"
    (folder / "enwiki-latest-pages-articles1.x.bz2").write_bytes(bz2.compress(page.encode()))
    (only,) = sources.wikipedia(tmp_path)
    assert only == Document("A-b-", long.strip())


@pytest.mark.slow
def test_exercises_are_solved_correctly() -> None:
    documents = list(mathematics(400, seed=3))
    assert documents == list(mathematics(400, seed=3)) != list(mathematics(400, seed=4))
    text = "\n".join(document.text for document in documents)
    claims = re.findall(r"(?<![-+*^\d] )\b(\d+) ([-+*]) (\d+) = (-?\d+)\b", text)
    assert len(claims) > 300
    for a, sign, b, result in claims:
        expected = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert int(result) == expected, (a, sign, b, result)
    solved = re.findall(
        r"Solve (\d+)\*\w \+ (\d+) = (-?\d+) for .*\n.*= (-?\d+)\.$", text, re.MULTILINE
    )
    assert solved
    for a, b, right, root in solved:
        assert int(a) * int(root) + int(b) == int(right)
    names = {exercise.__name__ for exercise in EXERCISES}
    assert len(names) == len(EXERCISES) == 13


def test_fortunes_and_descriptions_become_prose(tmp_path: Path) -> None:
    fortunes = tmp_path / "usr/share/games/fortunes"
    fortunes.mkdir(parents=True)
    (fortunes / "wise").write_text("Be\n\tkind.\n%\nBe brave.\n%\n")
    (fortunes / "wise.dat").write_bytes(b"\0\0")
    (only,) = sources.fortunes(tmp_path)
    assert only == Document("wise-000", "Be\n    kind.\n\nBe brave.")

    game = tmp_path / "usr/share/crawl/dat/descript"
    game.mkdir(parents=True)
    text = "%%%%\nCave\n\nIt is\ndark.\n%%%%\nScript\n\n{{ return 1 }}\n%%%%\n"
    (game / "branches.txt").write_text(text)
    (only,) = sources.crawl(tmp_path)
    assert only == Document("branches-000", "It is dark.")


def test_a_prepared_folder_is_recognised_and_any_change_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    assert not models.is_prepared(folder, "gguf")
    models.write_record(folder, "gguf")
    assert models.is_prepared(folder, "gguf")
    assert not models.is_prepared(folder, "another gguf")
    (folder / "model.safetensors").write_bytes(bytes(99) + b"\1")
    assert not models.is_prepared(folder, "gguf")
    (folder / "model.safetensors").write_bytes(bytes(100))
    assert models.is_prepared(folder, "gguf")
    (folder / "config.json").unlink()
    assert not models.is_prepared(folder, "gguf")
    for broken in ("", "[]", '{"recipe": 1}', "null"):
        (folder / models.RECORD).write_text(broken)
        assert not models.is_prepared(folder, "gguf")


def test_prepare_makes_a_folder_once_and_again_when_altered(
    awareness_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def convert(model: models.DemoModel, gguf: Path, folder: Path, progress: object) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(model.name)
        made.append(model.name)

    monkeypatch.setattr(models, "_gguf", lambda model, scratch, progress: scratch / "x.gguf")
    monkeypatch.setattr(models, "_convert", convert)
    folders = models.prepare(progress=lambda line: None)
    assert folders == {
        name: awareness_home / "models" / name for name in ("smollm2-135m", "gemma3-270m")
    }
    assert models.prepare("gemma3-270m", lambda line: None) == {
        "gemma3-270m": folders["gemma3-270m"]
    }
    assert made == ["smollm2-135m", "gemma3-270m"]
    (folders["gemma3-270m"] / "config.json").write_text("other")
    models.prepare(progress=lambda line: None)
    assert made == ["smollm2-135m", "gemma3-270m", "gemma3-270m"]
    assert (folders["gemma3-270m"] / "config.json").read_text() == "gemma3-270m"
    left = [path.name for path in (awareness_home / "models").iterdir() if path.is_dir()]
    assert sorted(left) == ["gemma3-270m", "smollm2-135m"]


def test_whoever_comes_second_waits_and_makes_nothing(
    awareness_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def convert(model: models.DemoModel, gguf: Path, folder: Path, progress: object) -> None:
        time.sleep(0.2)
        folder.mkdir()
        made.append(model.name)

    monkeypatch.setattr(models, "_gguf", lambda model, scratch, progress: scratch / "x.gguf")
    monkeypatch.setattr(models, "_convert", convert)
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda _: models.prepare("smollm2-135m", lambda line: None), range(2)))
    assert made == ["smollm2-135m"]


def test_unknown_models_and_missing_packages_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="gemma3-270m"):
        models.prepare("gpt-5", lambda line: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install"):
        models.prepare("smollm2-135m", lambda line: None)


def test_another_gguf_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.gguf").write_bytes(b"GGUF")
    spec = SimpleNamespace(origin=str(tmp_path / "package" / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(BadInput, match="not the pinned one"):
        models.prepare("smollm2-135m", lambda line: None)
    assert not (tmp_path / "models" / "smollm2-135m").exists()
