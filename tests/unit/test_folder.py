"""Model folders as downloads, clones and editors leave them: the file at fault is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from awareness_vllm.cli.main import main
from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import INDEX, LFS_POINTER, weights_fingerprint
from awareness_vllm.models.hf import cannot_load, load_model
from awareness_vllm.serving import launch

pytestmark = pytest.mark.unit

WEIGHTS = "model.safetensors"
POINTER = LFS_POINTER + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 269060552\n"
DEEP = b"[" * 100_000


@pytest.fixture
def model(tiny_models: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_models[0], tmp_path / "a model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("some words")
    return path


def torn(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


def header(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


DAMAGE: list[tuple[str, Callable[[bytes], bytes], str]] = [
    (WEIGHTS, lambda raw: POINTER, "git lfs pull"),
    (WEIGHTS, lambda raw: b"", "empty"),
    (WEIGHTS, torn, "bytes"),
    (WEIGHTS, lambda raw: raw + b"more", "bytes"),
    (WEIGHTS, lambda raw: raw[:7], "7 bytes"),
    (WEIGHTS, lambda raw: b"\xff" * 8 + raw[8:], "header"),
    (WEIGHTS, lambda raw: header(DEEP), "recursion"),
    (WEIGHTS, lambda raw: header(b"[]"), "object"),
    (WEIGHTS, lambda raw: header(b'{"a": {"data_offsets": [9, 3]}}'), "offsets"),
    (WEIGHTS, lambda raw: header(b'{"a": 7}'), "offsets"),
    (WEIGHTS, lambda raw: header(b"\xff\xfe"), "utf-8"),
    ("config.json", lambda raw: POINTER, "git lfs pull"),
    ("config.json", lambda raw: b"", "empty"),
    ("config.json", torn, "JSON"),
    ("config.json", lambda raw: b"\xef\xbb\xbf" + raw, "byte order mark"),
    ("config.json", lambda raw: raw.decode().encode("utf-16"), "UTF-8"),
    ("config.json", lambda raw: DEEP, "recursion"),
    ("config.json", lambda raw: b"[1, 2]", "list"),
    ("config.json", lambda raw: b'{"model_type": "llama", "text_config": [1]}', "text_config"),
    ("config.json", lambda raw: raw.replace(b"bfloat16", b"float8_e4m3fn"), "float8_e4m3fn"),
    ("tokenizer.json", lambda raw: POINTER, "git lfs pull"),
    ("tokenizer.json", lambda raw: b"", "empty"),
    ("tokenizer.json", torn, "tokenizer.json"),
    ("tokenizer.json", lambda raw: b"\xef\xbb\xbf" + raw, "byte order mark"),
    ("tokenizer.json", lambda raw: DEEP, "tokenizer.json"),
    ("tokenizer.json", lambda raw: b"[]", "tokenizer.json"),
]


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE)
def test_a_damaged_file_is_named(
    name: str,
    damage: Callable[[bytes], bytes],
    says: str,
    model: Path,
    text: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (model / name).write_bytes(damage((model / name).read_bytes()))
    argv = ["capture", "--model", str(model), "--text", str(text), "--store", str(text.parent)]
    assert main([*argv, "--json"]) == 1
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["type"] == "UnsupportedModel"
    assert says in " ".join(str(value) for value in error.values())
    assert name in error["message"] or model.name in error["message"]
    assert "Traceback" not in err
    if name == WEIGHTS:
        with pytest.raises(UnsupportedModel, match=WEIGHTS):
            load_model(model)


@pytest.mark.parametrize(("name", "damage", "says"), DAMAGE)
def test_serve_names_a_damaged_file_before_vllm_starts(
    name: str,
    damage: Callable[[bytes], bytes],
    says: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(launch, "become", lambda argv, **options: pytest.fail("vLLM started"))
    (model / name).write_bytes(damage((model / name).read_bytes()))
    assert main(["serve", str(model), "--store", str(model.parent), "--json"]) == 1
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["type"] == "UnsupportedModel"
    assert says in " ".join(str(value) for value in error.values())


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", WEIGHTS])
def test_check_names_a_pointer(
    name: str,
    model: Path,
    tiny_models: tuple[Path, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (model / name).write_bytes(POINTER)
    argv = ["check", "--source", str(tiny_models[1]), "--tokens", "9", "--target", str(model)]
    assert main([*argv, "--json"]) == 1
    assert "git lfs pull" in json.loads(capfd.readouterr().out)["error"]["remedy"]


def test_every_shard_of_the_index_is_there(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    names = sorted(tensors)
    shards = dict(zip(names, (files[i % 2] for i in range(len(names))), strict=True))
    for file in files:
        save_file(
            {k: v for k, v in tensors.items() if shards[k] == file}, model / file, {"format": "pt"}
        )
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert weights_fingerprint(model)
    assert load_model(model)
    (model / files[1]).rename(model.parent / "elsewhere")
    with pytest.raises(UnsupportedModel, match=files[1]):
        weights_fingerprint(model)
    (model / files[1]).symlink_to(model / "nowhere")
    with pytest.raises(UnsupportedModel, match=files[1]):
        geometry_of(model)
    (model / INDEX).write_text('{"weight_map": [1]}')
    with pytest.raises(UnsupportedModel, match="weight_map"):
        weights_fingerprint(model)


def configure(model: Path, **fields: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "of_tomorrow"])
def test_quantized_weights_are_refused_with_their_method(
    method: str, model: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configure(model, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    argv = ["capture", "--model", str(model), "--text", str(text), "--store", str(text.parent)]
    assert main([*argv, "--json"]) == 1
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["type"] == "UnsupportedModel"
    assert method in error["found"]
    assert "--engine vllm" in error["remedy"]
    assert geometry_of(model).layers  # a server can have such a target


def test_weights_that_the_files_lack_are_not_made_up(model: Path) -> None:
    # As an old GPTQ checkpoint: the method is in a file of its own, weights are called qweight.
    tensors = load_file(model / WEIGHTS)
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    renamed = {name.replace(".weight", ".qweight") if name == lost else name: tensors[name]
               for name in tensors}  # fmt: skip
    save_file(renamed, model / WEIGHTS, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match="q_proj"):
        load_model(model)


def test_code_of_a_model_is_never_run_nor_asked_for(
    model: Path, text: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model / "modeling_own.py").write_text("raise SystemExit('the code of the model ran')\n")
    auto = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    configure(model, auto_map=auto)
    assert load_model(model)  # the family's own classes suffice
    configure(model, model_type="own_family")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    argv = ["capture", "--model", str(model), "--text", str(text), "--store", str(text.parent)]
    assert main([*argv, "--json"]) == 1
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["type"] == "UnsupportedModel"
    assert "auto_map" in error["found"]


def test_vllm_is_no_remedy_for_itself() -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    assert "--engine" not in str(cannot_load("m", "vllm", config, ValueError("no kernel")))


def test_a_config_of_wrong_kinds_is_refused(model: Path) -> None:
    for fields in ({"hidden_size": "wide"}, {"num_hidden_layers": [3]}, {"dtype": 7}):
        shutil.copytree(model, model.parent / "other", dirs_exist_ok=True)
        configure(model.parent / "other", **fields)
        geometry_of.__globals__["_from_folder"].cache_clear()
        with pytest.raises(UnsupportedModel):
            geometry_of(model.parent / "other")


def test_the_fingerprint_is_that_of_older_versions(tmp_path: Path) -> None:
    save_file({"b": torch.arange(4000.0), "a": torch.zeros(0)}, tmp_path / WEIGHTS, {"k": "v"})
    assert weights_fingerprint(tmp_path) == (
        "571a08ac1097b515edc20ae7e1cd4c2e229f5db40f2e29e8cf5413b124933faa"
    )
