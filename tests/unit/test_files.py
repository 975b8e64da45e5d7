"""Atomic writes: a file is replaced as a whole, or stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from awareness_vllm.files import atomic_write

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
