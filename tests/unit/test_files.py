"""Atomic writes: a file is replaced as a whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from awareness_vllm.anchors.corpus import load
from awareness_vllm.cli.eval import read_cases
from awareness_vllm.files import atomic_write, read_text_file
from awareness_vllm.serving.tenants import Tenants

pytestmark = pytest.mark.unit


def test_a_file_is_replaced_and_readable_by_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as draft:
        draft.write_text("new")
        draft.chmod(0o600)
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


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
