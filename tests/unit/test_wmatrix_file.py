"""The `.wmatrix` file: a round trip, and an error for everything else."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awareness_demo.wmatrices import is_readable
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from awareness_vllm.errors import PackageCorrupt, WMatrixCorrupt
from awareness_vllm.files import file_digest
from awareness_vllm.packages.file import payload_digest
from awareness_vllm.packages.manifest import METADATA_KEY
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import read_digest, read_manifest

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def saved(wmatrix: WMatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wmatrices") / "folder" / "a.wmatrix"
    wmatrix.save(path)
    return path


def rewrite(
    path: Path,
    out: Path,
    manifest: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A copy with other fields or tensors whose payload digest is right all the same."""
    with safe_open(path, framework="pt") as file:
        states = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        document = json.loads(file.metadata()[METADATA_KEY]) | (manifest or {})
    states |= tensors or {}
    document["payload"] = payload_digest(json.dumps(document), sorted(states.items()))
    save_file(states, out, {METADATA_KEY: json.dumps(document)})
    return out


def test_only_a_file_of_this_version_is_readable(saved: Path, tmp_path: Path) -> None:
    assert is_readable(saved)
    assert not is_readable(tmp_path / "none.wmatrix")
    assert not is_readable(rewrite(saved, tmp_path / "old.wmatrix", {"ridge": 0.02}))


def same(one: WMatrix, other: WMatrix) -> bool:
    return (
        one.manifest.model_copy(update={"payload": ""})
        == other.manifest.model_copy(update={"payload": ""})
    ) and all(
        a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(tensors(one), tensors(other), strict=True)
    )


def tensors(w: WMatrix) -> list[torch.Tensor]:
    return [w.mean, w.scale, w.encode, w.decode, w.bias, *w.sink_keys, *w.sink_values]


def test_round_trip(wmatrix: WMatrix, saved: Path) -> None:
    result = load(saved)
    assert same(result, wmatrix)
    assert len(result.manifest.payload) == 64
    assert read_manifest(saved) == result.manifest
    assert [path.name for path in saved.parent.iterdir()] == ["a.wmatrix"]


def test_the_digest_tells_maps_apart(wmatrix: WMatrix, saved: Path, tmp_path: Path) -> None:
    wmatrix.save(tmp_path / "same")
    replace(wmatrix, bias=wmatrix.bias + 1).save(tmp_path / "other")
    assert file_digest(tmp_path / "same") == file_digest(saved) != file_digest(tmp_path / "other")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_altered_byte_is_noticed(wmatrix: WMatrix, saved: Path, data: st.DataObject) -> None:
    raw = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    position = data.draw(
        st.one_of(st.integers(0, header - 1), st.integers(0, len(raw) - 1)), label="position"
    )
    raw[position] = data.draw(st.integers(0, 255), label="byte")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "altered.wmatrix"
        path.write_bytes(raw)
        try:
            result = load(path)
        except WMatrixCorrupt:
            return
    assert position < header or raw == saved.read_bytes()
    assert same(result, wmatrix)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_noticed(saved: Path, share: float) -> None:
    raw = saved.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "short.wmatrix"
        path.write_bytes(raw[: int(share * len(raw))])
        for action in (load, read_manifest):
            with pytest.raises(WMatrixCorrupt, match="Remedy"):
                action(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mean", (49,)),
        ("encode", (50, 4)),
        ("decode", (5, 23)),
        ("bias", (1, 24)),
        ("sink.2.key", (1, 1, 4)),
        ("sink.3.key", (2, 1, 4)),
        ("token_nll", (1,)),
    ],
)
def test_wrong_shapes_are_refused(
    saved: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = rewrite(saved, tmp_path / "w", tensors={name: torch.zeros(shape)})
    with pytest.raises(WMatrixCorrupt, match="the shapes of its geometries"):
        load(path)


def test_an_unchanged_copy_is_accepted(wmatrix: WMatrix, saved: Path, tmp_path: Path) -> None:
    assert same(load(rewrite(saved, tmp_path / "w")), wmatrix)


@pytest.mark.parametrize("change", [{"token_nll": 1}, {"format": "awareness-wmatrix/2"}])
def test_unknown_manifest_fields_and_formats_are_refused(
    saved: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = rewrite(saved, tmp_path / "w", change)
    for action in (load, read_manifest):
        with pytest.raises(WMatrixCorrupt, match=next(iter(change))):
            action(path)


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04K\x01.", b"{}"])
def test_other_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(WMatrixCorrupt):
        load(tmp_path / "w")


def test_safetensors_without_a_manifest_are_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(1)}, tmp_path / "w")
    with pytest.raises(WMatrixCorrupt):
        load(tmp_path / "w")


def test_masked_rows_are_mapped_as_without_a_source(wmatrix: WMatrix) -> None:
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(6, wmatrix.manifest.source.width, generator=generator)
    embeddings = torch.randn(6, 18, generator=generator)
    masked = torch.tensor([True, False, False, True, False, False])
    mixed, without, full = (
        torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)
        for keys, values in (
            wmatrix.map(source, embeddings, masked),
            wmatrix.map(None, embeddings),
            wmatrix.map(source, embeddings),
        )
    )
    torch.testing.assert_close(mixed[masked], without[masked])
    torch.testing.assert_close(mixed[~masked], full[~masked])
    assert ((without - full).abs().amax(1) > 0.1).all()


def test_the_map_standardises_encodes_decodes(wmatrix: WMatrix) -> None:
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(3, wmatrix.manifest.source.width, generator=generator)
    embeddings = torch.randn(3, 18, generator=generator)
    x = (torch.cat((source, embeddings), 1) - wmatrix.mean) * wmatrix.scale
    expected = x @ wmatrix.encode @ wmatrix.decode + wmatrix.bias
    keys, values = wmatrix.map(source, embeddings)
    assert [k.shape for k in keys] == [(3, 1, 4)] * 3
    result = torch.cat([s.flatten(1) for s in (*keys, *values)], dim=1)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["mean", "scale", "encode", "decode", "bias", "sink.0.key"])
def test_a_value_that_is_not_finite_is_refused(
    saved: Path, wmatrix: WMatrix, tmp_path: Path, name: str, value: float
) -> None:
    with safe_open(saved, framework="pt") as file:
        tensor = file.get_tensor(name).clone()
    tensor.view(-1)[0] = value
    with pytest.raises(WMatrixCorrupt, match="finite"):
        load(rewrite(saved, tmp_path / "w", tensors={name: tensor}))


@pytest.mark.parametrize("name", ["sink.0.key", "sink.2.value"])
def test_a_sink_of_states_that_no_model_computes_is_refused(
    saved: Path, wmatrix: WMatrix, tmp_path: Path, name: str
) -> None:
    states = torch.full_like(wmatrix.sink_keys[0], -1e6)
    with pytest.raises(WMatrixCorrupt, match=name):
        load(rewrite(saved, tmp_path / "w", tensors={name: states}))


@pytest.mark.parametrize("name", ["bias", "decode"])
def test_weights_that_no_fit_gives_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    with safe_open(saved, framework="pt") as file:
        tensor = file.get_tensor(name).clone()
    tensor.view(-1)[0] = 1e30
    with pytest.raises(WMatrixCorrupt, match="weights"):
        load(rewrite(saved, tmp_path / "w", tensors={name: tensor}))


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(
    saved: Path, wmatrix: WMatrix, tmp_path: Path, scale: float
) -> None:
    scales = wmatrix.scale.clone()
    scales[3] = scale
    with pytest.raises(WMatrixCorrupt, match="scale"):
        load(rewrite(saved, tmp_path / "w", tensors={"scale": scales}))


@pytest.mark.parametrize(
    "change",
    [
        {"sink": []},
        {"sink": [-1]},
        {"sink": [10**6]},
        {"layers": []},
        {"layers": [99]},
        {"layers": [-1]},
        {"layers": [0, 0]},
        {"rank": 0},
        {"predecessors": 1000},
        {"versions": {"a\n": ""}},
    ],
)
def test_a_manifest_out_of_bounds_is_refused(
    saved: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    path = rewrite(saved, tmp_path / "w", change)
    for action in (load, read_manifest, read_digest):
        with pytest.raises(WMatrixCorrupt):
            action(path)


@pytest.mark.parametrize(
    "positions", [{"scheme": "unknown"}, {"scheme": "yarn"}, {"theta": None}, {"factors": [1.0]}]
)
def test_positions_that_nobody_can_rotate_by_are_refused(
    saved: Path, tmp_path: Path, positions: dict[str, Any]
) -> None:
    source = read_manifest(saved).source.model_dump(mode="json")
    source["layers"][0]["positions"] |= {"scheme": "longrope", **positions}
    with pytest.raises(WMatrixCorrupt, match="positions"):
        load(rewrite(saved, tmp_path / "w", {"source": source}))


@pytest.mark.parametrize(
    ("name", "dtype"), [("mean", torch.float64), ("encode", torch.int16), ("bias", torch.bfloat16)]
)
def test_another_dtype_is_refused(
    saved: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    with safe_open(saved, framework="pt") as file:
        tensor = file.get_tensor(name).to(dtype)
    with pytest.raises(WMatrixCorrupt, match=name):
        load(rewrite(saved, tmp_path / "w", tensors={name: tensor}))


def test_a_map_that_was_replaced_in_between_is_refused(wmatrix: WMatrix, tmp_path: Path) -> None:
    path = tmp_path / "w"
    wmatrix.save(path)
    _, digest = read_digest(path)
    assert same(load(path, digest=digest), wmatrix)
    replace(wmatrix, bias=wmatrix.bias + 1).save(path)
    with pytest.raises(WMatrixCorrupt, match="sha256"):
        load(path, digest=digest)


def test_links_to_a_map_are_followed(saved: Path, wmatrix: WMatrix, tmp_path: Path) -> None:
    # A download by the Hugging Face hub is one.
    link = tmp_path / "pair.wmatrix"
    link.symlink_to(saved)
    assert same(load(link), wmatrix)
    assert read_digest(link) == read_digest(saved)


@pytest.mark.parametrize("state", [1e9, float("nan")])
def test_states_that_no_model_computes_are_refused(wmatrix: WMatrix, state: float) -> None:
    manifest = wmatrix.manifest
    source = wmatrix.mean[: manifest.source_width].repeat(2, 1)
    embeddings = torch.zeros(2, manifest.embedding_width)
    wmatrix.map(source, embeddings)
    source[1, 3] = state
    with pytest.raises(PackageCorrupt, match="plausible"):
        wmatrix.map(source, embeddings)
    # A masked row's states are not looked at.
    wmatrix.map(source, embeddings, torch.tensor([False, True]))


def test_int8_rounds_each_weight_by_at_most_half_a_level(wmatrix: WMatrix) -> None:
    small = wmatrix.to_int8()
    for name, dim in (("encode", 1), ("decode", 0)):
        weights, rounded = getattr(wmatrix, name).float(), getattr(small, name)
        largest = weights.abs().amax(dim, keepdim=True)
        assert rounded.dtype == torch.bfloat16
        # Half a level, and bfloat16's own rounding before and after.
        assert ((rounded.float() - weights).abs() <= largest * (0.5 / 127 + 2**-7)).all()
        assert (rounded.float() != weights).any()


def test_an_int8_file_round_trips_to_the_same_bytes(wmatrix: WMatrix, tmp_path: Path) -> None:
    encode = wmatrix.encode.clone()
    encode[3], encode[4] = 0, 1e-38  # rows without a level
    small = replace(wmatrix, encode=encode).to_int8()
    small.save(tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        assert file.get_slice("encode").get_dtype() == "I8"
        assert file.get_slice("decode_scale").get_shape() == [wmatrix.manifest.target.width]
    result = load(tmp_path / "w")
    assert same(result, small)
    assert result.payload == result.manifest.payload == small.payload
    result.save(tmp_path / "again")
    assert file_digest(tmp_path / "again") == file_digest(tmp_path / "w")


def test_a_quantized_map_has_no_certificate(wmatrix: WMatrix) -> None:
    certified = wmatrix.manifest.model_copy(update={"certificate": {"tier": 1}})
    assert replace(wmatrix, manifest=certified).to_int8().manifest.certificate is None


@pytest.mark.parametrize(
    ("name", "value"), [("encode", -128), ("encode_scale", -1.0), ("decode_scale", 1e38)]
)
def test_int8_that_no_rounding_gives_is_refused(
    wmatrix: WMatrix, tmp_path: Path, name: str, value: float
) -> None:
    wmatrix.to_int8().save(tmp_path / "w")
    with safe_open(tmp_path / "w", framework="pt") as file:
        tensor = file.get_tensor(name).clone()
    tensor.view(-1)[0] = value
    with pytest.raises(WMatrixCorrupt, match="no rounding"):
        load(rewrite(tmp_path / "w", tmp_path / "v", tensors={name: tensor}))


@pytest.mark.parametrize("change", [{"quantization": None}, {"quantization": "int4"}])
def test_another_quantization_is_refused(
    wmatrix: WMatrix, saved: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    wmatrix.to_int8().save(tmp_path / "w")
    with pytest.raises(WMatrixCorrupt):
        load(rewrite(tmp_path / "w", tmp_path / "v", change))
    with pytest.raises(WMatrixCorrupt, match="tensors"):
        load(rewrite(saved, tmp_path / "v", {"quantization": "int8"}))
