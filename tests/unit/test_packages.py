"""Memory packages: the same content the same ID, and no altered byte goes unnoticed."""

from __future__ import annotations

import json
import shutil
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
from awareness_vllm.packages.file import Package, build, publish, read, read_index, verify
from awareness_vllm.packages.manifest import METADATA_KEY, read_manifest
from awareness_vllm.packages.origin import is_own
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


def with_value(value: float, name: str = "layers.1.value") -> dict[str, torch.Tensor]:
    """One of the published package's tensors, with one value replaced."""
    states = torch.zeros(12, *((2, 4) if name.startswith("layers.0") else (1, 8)))
    states[5, 0, 3] = value
    return {name: states.bfloat16()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layers.0.key", "layers.1.value"])
def test_a_state_that_is_not_finite_is_refused(
    published: Path, tmp_path: Path, name: str, value: float
) -> None:
    path = rewrite(published, tmp_path / "p", tensors=with_value(value, name))
    for action in (read, read_index, verify):
        with pytest.raises(PackageCorrupt, match="finite"):
            action(path)


def test_a_state_beyond_what_the_cache_can_hold_is_refused(published: Path, tmp_path: Path) -> None:
    path = rewrite(published, tmp_path / "p", tensors=with_value(-7e4))
    assert read(path).values[1].min() < -6e4
    for action in (read, read_index):
        with pytest.raises(PackageCorrupt, match="at most 65504"):
            action(path, largest=torch.finfo(torch.float16).max)


SPANS = torch.stack((torch.arange(12), torch.arange(1, 13)), dim=1)


@pytest.mark.parametrize(
    "tensors",
    [
        {"tokens": torch.zeros(12, dtype=torch.bool)},
        {"tokens": torch.zeros(12, dtype=torch.int64)},
        {"tokens": torch.full((12,), -1, dtype=torch.int32)},
        {"tokens": torch.full((12,), 300, dtype=torch.int32)},
        {"spans": SPANS.int()},
        {"spans": SPANS - 1},
        {"spans": SPANS + 1},
        {"spans": SPANS.flip(1)},
        {"spans": SPANS.flip(0)},
        {"text": torch.full((12,), 0xFF, dtype=torch.uint8)},
        {"text": torch.zeros(12 * 512 + 1, dtype=torch.uint8)},
        {"text": torch.zeros(3, 4, dtype=torch.uint8)},
        {"layers.0.key": torch.zeros(12, 2, 4, dtype=torch.float16)},
        {"layers.0.key": torch.zeros(12, 2, 4)},
        {"layers.2.key": torch.zeros(12, 2, 4, dtype=torch.bfloat16)},
        {"more": torch.zeros(1)},
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    published: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = rewrite(published, tmp_path / "p", tensors=tensors)
    for action in (read, read_index, verify):
        with pytest.raises(PackageCorrupt):
            action(path)


def test_a_missing_tensor_is_refused(published: Path, tmp_path: Path) -> None:
    with safe_open(published, framework="pt") as file:
        states = {name: file.get_tensor(name) for name in file.keys() if name != "text"}  # noqa: SIM118
        metadata = file.metadata()
    save_file(states, tmp_path / "p", metadata)
    with pytest.raises(PackageCorrupt, match="6 tensors"):
        read_manifest(tmp_path / "p")


@pytest.mark.parametrize(
    "change",
    [
        {"name": "red \x1b[31m"},
        {"name": "two\nlines"},
        {"name": "x" * 201},
        {"tokens": -1},
        {"tokens": "12"},
        {"tokens": 12.0},
        {"versions": {str(i): "" for i in range(17)}},
        {"versions": {"torch": "x" * 201}},
        {"first_tokens": [0]},
        {"first_tokens": [-1, 0]},
        {"first_tokens": [13, 0]},
        {"payload": "0" * 65},
        {"engine": "other"},
    ],
)
def test_a_manifest_out_of_bounds_is_refused(
    published: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = rewrite(published, tmp_path / "p", change)
    with pytest.raises(PackageCorrupt) as caught:
        read_manifest(path)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"dtype": "float64"},
        {"vocab_size": 0},
        {"hidden_size": 1 << 40},
        {"name": "\x07"},
    ],
)
def test_a_geometry_out_of_bounds_is_refused(
    published: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    geometry = read_manifest(published).geometry.model_dump(mode="json") | change
    with pytest.raises(PackageCorrupt):
        read_manifest(rewrite(published, tmp_path / "p", {"geometry": geometry}))


@pytest.mark.parametrize(
    "positions",
    [
        {"theta": 0.0},
        {"theta": -1.0},
        {"theta": 1e300},
        {"rotary_dim": 3},
        {"rotary_dim": 6},
        {"rotary_dim": -2},
        {"factors": [1.0, -1.0]},
        {"original": 0},
    ],
)
def test_positions_out_of_bounds_are_refused(
    published: Path, tmp_path: Path, positions: dict[str, Any]
) -> None:
    geometry = read_manifest(published).geometry.model_dump(mode="json")
    geometry["layers"][0]["positions"] |= positions
    with pytest.raises(PackageCorrupt):
        read_manifest(rewrite(published, tmp_path / "p", {"geometry": geometry}))


def test_a_key_twice_in_a_manifest_is_refused(published: Path, tmp_path: Path) -> None:
    with safe_open(published, framework="pt") as file:
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = file.metadata()[METADATA_KEY]
    save_file(states, tmp_path / "p", {METADATA_KEY: document[:-1] + ', "name": "another"}'})
    with pytest.raises(PackageCorrupt, match="twice"):
        read_manifest(tmp_path / "p")


def test_a_link_is_no_package(published: Path, tmp_path: Path) -> None:
    link = tmp_path / published.name
    link.symlink_to(published)
    for action in (read, read_index, read_manifest):
        with pytest.raises(PackageCorrupt, match="link"):
            action(link)


def test_states_of_another_dtype_than_the_models_are_described_as_they_are(
    make_package: Make,
) -> None:
    package = make_package()
    halves = [key.half() for key in package.keys], [value.half() for value in package.values]
    parts = {name: getattr(package, name) for name in ("text", "tokens", "spans")}
    served = build(
        geometry=package.geometry,
        keys=halves[0],
        values=halves[1],
        engine="vllm",
        versions={},
        **parts,
    )
    assert served.geometry.dtype == "float16"
    assert served.geometry.same_model(package.geometry)


# Origin


def test_a_package_is_this_homes_own_wherever_its_file_goes(
    make_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    digest = read_index(publish(make_package(), tmp_path / "store")).digest
    assert is_own(digest)
    key = tmp_path / "home" / "seal.key"
    assert key.stat().st_mode & 0o077 == 0
    assert not is_own("0" * 64)
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "another"))
    assert not is_own(digest)
    # A seal that somebody else wrote into this home is none.
    shutil.copytree(tmp_path / "home" / "seals", tmp_path / "another" / "seals")
    assert not is_own(digest)


def test_without_a_home_nothing_is_sealed_and_nothing_fails(
    make_package: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "file" / "home"))
    path = publish(make_package(), tmp_path / "store")
    assert not is_own(read_index(path).digest)
