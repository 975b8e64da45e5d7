"""Memory packages: the same content the same ID, and no altered byte goes unnoticed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from awareness_vllm.errors import PackageCorrupt
from awareness_vllm.files import file_digest
from awareness_vllm.packages.file import Package, publish, read, read_index, verify
from awareness_vllm.packages.manifest import METADATA_KEY, read_manifest
from awareness_vllm.packages.store import digest_in

pytestmark = pytest.mark.unit

Make = Callable[..., Package]


@pytest.fixture(scope="module")
def published(make_package: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(make_package(), tmp_path_factory.mktemp("store"))


def rewrite(
    path: Path,
    out: Path,
    manifest: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A copy of a package with other manifest fields or tensors, a well-formed file still."""
    with safe_open(path, framework="pt") as file:
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[METADATA_KEY])
    metadata = {METADATA_KEY: json.dumps(document | (manifest or {}))}
    save_file(states | (tensors or {}), out, metadata)
    return out


def test_round_trip(published: Path, make_package: Make) -> None:
    package, result = make_package(), verify(published)
    assert (result.manifest, result.text, result.tokens) == (
        package.manifest,
        package.text,
        package.tokens,
    )
    assert (result.spans == package.spans).all()
    for one, other in zip(package.keys + package.values, result.keys + result.values, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert read_manifest(published) == package.manifest
    read(published, digest=digest_in(published.stem))


def test_same_content_same_id(published: Path, make_package: Make, tmp_path: Path) -> None:
    assert publish(make_package(), tmp_path).name == published.name
    assert publish(make_package(seed=1), tmp_path).name != published.name
    assert publish(make_package("hello world"), tmp_path).name != published.name
    assert not list(tmp_path.glob(".publish-*"))


def test_an_empty_text_can_be_packaged(make_package: Make, tmp_path: Path) -> None:
    assert verify(publish(make_package(""), tmp_path)).text == ""


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_is_noticed(published: Path, data: st.DataObject) -> None:
    raw = bytearray(published.read_bytes())
    # The header is where a flip can do the strangest things, so look there as often as elsewhere.
    header = 8 + int.from_bytes(raw[:8], "little")
    position = data.draw(
        st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)), label="position"
    )
    raw[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / published.name
        path.write_bytes(raw)
        for action in (read, read_index):
            with pytest.raises(PackageCorrupt):
                action(path, digest=digest_in(published.stem))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_altered_byte_is_noticed_without_an_id(published: Path, data: st.DataObject) -> None:
    raw = bytearray(published.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    position = data.draw(
        st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)), label="position"
    )
    raw[position] = data.draw(st.integers(0, 255), label="byte")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "renamed.safetensors"
        path.write_bytes(raw)
        try:
            result = verify(path)
        except PackageCorrupt:
            return
    # Blanks and escapes of the JSON can change; what it says cannot.
    one, other = verify(published), result
    assert position < header or raw == published.read_bytes()
    assert (one.manifest, one.text, one.tokens) == (other.manifest, other.text, other.tokens)
    assert (one.spans == other.spans).all()
    for before, after in zip(one.keys + one.values, other.keys + other.values, strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"engine": "vllm"}, {"versions": {"torch": "1"}}]
)
def test_another_manifest_over_the_same_states_is_noticed(
    published: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(PackageCorrupt, match="payload"):
        verify(rewrite(published, tmp_path / "p", change))


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_noticed(published: Path, share: float) -> None:
    raw = published.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / published.name
        path.write_bytes(raw[: int(share * len(raw))])
        for action in (read, read_manifest, verify):
            with pytest.raises(PackageCorrupt, match="Remedy"):
                action(path)


def test_an_unknown_manifest_field_is_refused(published: Path, tmp_path: Path) -> None:
    path = rewrite(published, tmp_path / "p", {"token_nll": 1})
    with pytest.raises(PackageCorrupt, match="token_nll"):
        read(path)


@pytest.mark.parametrize("version", ["awareness-memory/2", "", None])
def test_another_format_is_refused(published: Path, tmp_path: Path, version: str | None) -> None:
    path = rewrite(published, tmp_path / "p", {"format": version})
    with pytest.raises(PackageCorrupt, match="format"):
        read_manifest(path)


def test_safetensors_without_a_manifest_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "p")
    with pytest.raises(PackageCorrupt, match="no readable JSON"):
        read_manifest(tmp_path / "p")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.0.key", torch.zeros(12, 2, 3, dtype=torch.bfloat16)),
        ("layers.1.value", torch.zeros(11, 1, 8, dtype=torch.bfloat16)),
        ("tokens", torch.zeros(11, dtype=torch.int32)),
        ("spans", torch.zeros(12, 3, dtype=torch.int64)),
    ],
)
def test_a_wrong_shape_is_refused(
    published: Path, tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    path = rewrite(published, tmp_path / "p", tensors={name: tensor})
    with pytest.raises(PackageCorrupt, match=r"tensor .*by its manifest"):
        read(path)


def test_other_states_under_the_same_manifest_are_noticed(published: Path, tmp_path: Path) -> None:
    zeros = torch.zeros(12, 2, 4, dtype=torch.bfloat16)
    path = rewrite(published, tmp_path / "p", tensors={"layers.0.key": zeros})
    with pytest.raises(PackageCorrupt, match="payload"):
        verify(path)


def test_a_missing_file_is_not_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(PackageCorrupt):
        read(tmp_path / "nothing.safetensors")


def test_the_id_is_the_digest_of_the_bytes(published: Path) -> None:
    assert published.stem == f"mem_{file_digest(published)[:32]}"
    assert read_index(published).digest == file_digest(published)
