"""Texts from files: what is read, how it is cleaned, and a split that never moves a document."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from awareness_demo.sources import fortunes, group
from hypothesis import given, settings
from hypothesis import strategies as st

from awareness_vllm.anchors.corpus import Document, digest, load, split, tidy, windows
from awareness_vllm.anchors.html import html_to_text
from awareness_vllm.errors import BadInput

pytestmark = pytest.mark.unit

LONG = "All happy families are alike, but this sentence is only here to be long enough. " * 4
documents = st.lists(
    st.builds(Document, st.text(max_size=8), st.text(max_size=8)), unique_by=lambda d: d.name
)


def test_folders_are_read_sorted_and_whole(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("B " + LONG)
    (tmp_path / "a.txt").write_text("A " + LONG)
    (tmp_path / "c.rst").write_text("C " + LONG)
    (tmp_path / ".hidden.txt").write_text("H " + LONG)
    (tmp_path / "image.png").write_bytes(b"\x89PNG" + bytes(300))
    names = [document.name for document in load([tmp_path])]
    assert names == [f"{tmp_path.name}/{name}" for name in ("a.txt", "b/x.md", "c.rst")]
    assert [document.name for document in load([tmp_path / "a.txt"])] == ["a.txt"]


def test_a_text_is_taken_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    (tmp_path / "b.txt").write_text("\n" + LONG.upper().replace(" ", "  "))
    assert [document.name for document in load([tmp_path])] == [f"{tmp_path.name}/a.txt"]


def test_short_documents_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 199)
    (tmp_path / "b.txt").write_text("y" * 200)
    assert [document.text for document in load([tmp_path])] == ["y" * 200]


def test_missing_paths_and_empty_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        load([tmp_path / "nothing"])
    with pytest.raises(BadInput, match="no texts"):
        load([tmp_path])


def test_latin_1_is_read_and_binary_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "latin.txt").write_bytes(("Café " + LONG).encode("latin-1"))
    (tmp_path / "binary").write_bytes(b"\xff\x01\x02" * 200)
    (tmp_path / "nul.txt").write_bytes(b"a\0b" * 200)
    with caplog.at_level(logging.WARNING):
        result = load([tmp_path])
    assert [document.text[:4] for document in result] == ["Café"]
    assert "binary" in caplog.text
    assert "nul.txt" in caplog.text


def test_fortune_files_become_documents_of_several_sayings(tmp_path: Path) -> None:
    sayings = [f"Saying number {i} is wise. " + "word " * 20 for i in range(100)]
    folder = tmp_path / "usr/share/games/fortunes"
    folder.mkdir(parents=True)
    (folder / "sayings").write_text("\n%\n".join(sayings) + "\n%\n")
    result = list(fortunes(tmp_path))
    assert len(result) > 2
    assert all(2000 <= len(document.text) <= 4000 for document in result[:-1])
    assert len({document.name for document in result}) == len(result)
    assert not any("%" in document.text for document in result)
    assert sum(document.text.count("Saying number") for document in result) == 100


def test_html_gives_its_text_only() -> None:
    page = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><body>
    <nav><ul><li>Menu</li></ul></nav><script>var x = "<p>no</p>";</script>
    <h1>Title</h1><p>One <b>bold</b>
    word &amp; a <a href="x">link</a>.</p><pre>a
      b</pre><ul><li>first</li><li>second</li></ul></body></html>"""
    text = tidy(html_to_text(page))
    assert text.split("\n\n") == [
        "Title",
        "One bold word & a link.",
        "a\n      b",
        "first",
        "second",
    ]


def test_html_without_closing_head_is_read() -> None:
    assert html_to_text("<html><head><title>T</title><body><p>Text").strip() == "Text"


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("<>/ apdivscriptstylenavheadbody&;!-="), max_size=80))
def test_html_to_text_never_fails(html: str) -> None:
    assert isinstance(html_to_text(html), str)


def test_tidy_keeps_lines_and_indentation() -> None:
    assert tidy("a  b \r\n\n\n\n    c\td\n") == "a b\n\n    c d"


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("ab \n"), max_size=300), size=st.integers(1, 50))
def test_windows_are_pieces_of_the_text_in_order(text: str, size: int) -> None:
    position = 0
    for piece in windows(Document("d", text), size):
        assert piece
        assert len(piece) <= 2 * size
        position = text.index(piece, position) + len(piece)


def test_windows_cut_at_whitespace_and_drop_a_short_tail() -> None:
    text = "word " * 100
    pieces = windows(Document("d", text), 98)
    assert all(set(piece.split()) == {"word"} for piece in pieces)
    # 499 characters: five windows of about 99, and nothing of the few characters that remain.
    assert len(pieces) == 5
    assert [len(piece) for piece in windows(Document("d", "a" * 100 + " " + "b" * 24), 100)] == [
        100
    ]
    assert len(windows(Document("d", "a" * 100 + " " + "b" * 25), 100)) == 2
    with pytest.raises(BadInput):
        windows(Document("d", "x"), 0)


@settings(max_examples=100, deadline=None)
@given(documents=documents, more=documents, fraction=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_document_never_changes_sides(
    documents: list[Document], more: list[Document], fraction: float, seed: int
) -> None:
    train, held_out = split(documents, fraction, seed)
    assert sorted(map(id, train + held_out)) == sorted(map(id, documents))
    others = [d for d in more if d.name not in {x.name for x in documents}]
    wider_train, wider_held_out = split(others + documents[::-1], fraction, seed)
    assert set(train) <= set(wider_train)
    assert set(held_out) <= set(wider_held_out)


def test_the_fraction_is_about_what_was_asked_for() -> None:
    many = [Document(f"d{i}", "") for i in range(2000)]
    assert 140 < len(split(many, 0.1, 0)[1]) < 260
    assert split(many, 0.1, 0) == split(many, 0.1, 0)
    assert split(many, 0.1, 0) != split(many, 0.1, 1)
    assert split(many, 0.0, 0)[1] == []
    assert split(many, 1.0, 0)[0] == []
    with pytest.raises(BadInput):
        split(many, 1.5, 0)


def test_digest_depends_on_content_not_order() -> None:
    one, other = Document("a", "x"), Document("b", "y")
    assert digest([one, other]) == digest([other, one])
    assert digest([one]) != digest([Document("a", "y")])
    assert digest([one]) != digest([Document("c", "x")])
    assert digest([one]) != digest([one, other])


def test_group_joins_in_order() -> None:
    assert group(["aa", "bb", "c"], "-", 5) == ["aa-bb", "c"]
    assert group([]) == []
