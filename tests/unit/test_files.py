"""Atomic writes: a file is replaced as a whole, or stays as it was; nothing is left of a kill."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from awareness_vllm.anchors.corpus import load
from awareness_vllm.cli.eval import read_cases
from awareness_vllm.files import (
    DRAFT,
    atomic_write,
    read_text_file,
    replace_text,
    scratch_folder,
    sweep,
)
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.tenants import Tenants, stores_of
from awareness_vllm.serving.tiers import DiskTier

pytestmark = pytest.mark.unit


def save_text(path: Path) -> None:
    path.write_text("new")


def save_tensors(path: Path) -> None:
    """A library that writes beside its path, and for the owner alone."""
    save_file({"x": torch.ones(3)}, path)


@pytest.mark.parametrize("save", [save_text, save_tensors])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_is_replaced_with_the_access_of_the_umask(
    tmp_path: Path, save: Callable[[Path], None], umask: int
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    before = os.umask(umask)
    try:
        with atomic_write(path) as draft:
            save(draft)
            assert path.read_text() == "old"
    finally:
        os.umask(before)
    assert path.read_bytes() != b"old"
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_package_has_the_access_of_the_umask(
    make_package: Callable[..., Package], tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        path = publish(make_package(), tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as draft, draft.open("w") as file:
        print("half", "\ud800", file=file)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_mark_that_windows_puts_before_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    for name, text in {
        "text.txt": "one\r\ntwo\ufeff",
        "long.txt": "words " * 50,
        "cases.jsonl": '{"context": "c", "question": "q", "answer": "a"}\r\n',
        "tenants.json": '{"acme": {"api_keys": ["sk-1"], "store": "acme"}}',
    }.items():
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_text_file(tmp_path / "text.txt") == "one\r\ntwo\ufeff"
    (document,) = load([tmp_path / "long.txt"])
    assert document.text.startswith("words")
    assert read_cases(tmp_path / "cases.jsonl")[0]["context"] == "c"
    assert Tenants.read(tmp_path / "tenants.json").authenticate("Bearer sk-1") == "acme"


def test_bytes_are_on_the_disk_before_the_name_and_then_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps, fsync, replace = tmp_path / "file", list[str](), os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    def noted_replace(draft: Path, final: Path) -> None:
        steps.append(f"{draft.name} becomes {final.name}")
        replace(draft, final)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_write(path) as draft:
        save_tensors(draft)
    assert steps == ["sync file", "file becomes file", f"sync {tmp_path.name}"]
    steps.clear()
    with atomic_write(path, durable=False) as draft:
        save_tensors(draft)
    assert steps == ["file becomes file"]


def leave(folder: Path) -> list[Path]:
    """What a kill leaves: a folder with a library's own draft; of version 0.1, a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{DRAFT}1").mkdir()
    (folder / f"{DRAFT}1" / ".tmpBUBHQt").write_text("half")
    (folder / f"{DRAFT}2").write_text("half")
    return [folder / f"{DRAFT}1", folder / f"{DRAFT}2"]


def start_disk_tier(folder: Path) -> None:
    DiskTier(folder, 1, "model", torch.bfloat16)


def start_server(folder: Path) -> None:
    stores_of(ServingConfig(store=str(folder)))


def write(folder: Path) -> None:
    with atomic_write(folder / "file") as draft:
        draft.write_text("new")


@pytest.mark.parametrize("use", [write, start_disk_tier, start_server])
def test_leftovers_go_when_a_folder_is_used_again(
    tmp_path: Path, use: Callable[[Path], None]
) -> None:
    left = leave(tmp_path / "store")
    (tmp_path / "store" / "notes.txt").write_text("x")
    use(tmp_path / "store")
    assert not any(path.exists() for path in left)
    assert (tmp_path / "store" / "notes.txt").is_file()


def test_drafts_of_the_living_stay_and_those_of_the_dead_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from awareness_vllm.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1]) / 'file') as draft:\n"
        "    draft.write_text('half'); print(draft, flush=True); time.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        draft = Path(writer.stdout.readline().strip())
        write(tmp_path)  # a second writer does not wait for the first
        sweep(tmp_path)
        assert draft.read_text() == "half"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert draft.is_file()
        sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_locks_files_are_written_and_nothing_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError("no locks available")

    left = leave(tmp_path)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write(tmp_path)
    assert (tmp_path / "file").read_text() == "new"
    assert all(path.exists() for path in left)


def test_a_scratch_folder_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as scratch:
        (scratch / "a" / "b").mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []
    sweep(tmp_path / "missing")


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    replace_text(page, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(page, 100_000 * "x" + "\ud800")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [("page.html", "old")]
