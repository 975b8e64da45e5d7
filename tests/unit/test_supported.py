"""Configurations of vLLM under which memories would not work: refused at start, by name."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from connector_stubs import connector
from vllm.config import VllmConfig
from vllm.config.cache import CacheDType
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from awareness_vllm.errors import UnsupportedServer
from awareness_vllm.serving import server
from awareness_vllm.serving.connector import connector as connector_module
from awareness_vllm.serving.supported import KV_DTYPES, SINGLE, check_cache, check_engine

pytestmark = pytest.mark.unit


def config(parallel: dict[str, Any], cache: dict[str, Any]) -> VllmConfig:
    """vLLM's configuration of an engine, which it would want processes and a GPU for."""
    made = VllmConfig()
    for part, fields in ((made.parallel_config, parallel), (made.cache_config, cache)):
        for name, value in fields.items():
            assert hasattr(part, name)
            setattr(part, name, value)
    return made


@pytest.mark.parametrize("name", SINGLE)
def test_an_engine_without_all_layers_and_tokens_in_each_rank_is_refused(name: str) -> None:
    check_engine(config({name: 1, "tensor_parallel_size": 4}, {}))
    with pytest.raises(UnsupportedServer) as error:
        check_engine(config({name: 2}, {}))
    flag = "--" + name.replace("_", "-")
    assert (error.value.found, error.value.remedy) == (f"{flag} 2", SINGLE[name])


@pytest.mark.parametrize(
    ("dtype", "skipped", "capability", "named"),
    [
        *((dtype, [], (9, 0), None) for dtype in KV_DTYPES),
        *((dtype, [], (8, 9), None) for dtype in KV_DTYPES),
        *((dtype, ["0"], (8, 0), None) for dtype in ("auto", "bfloat16")),
        ("fp8", [], None, None),
        ("fp8_e5m2", [], (8, 0), None),
        ("fp8", [], (8, 6), "fp8 with compute capability 8.6"),
        ("fp8_e4m3", [], (8, 0), "fp8_e4m3 with compute capability 8.0"),
        ("fp8_e5m2", ["0", "sliding_window"], (9, 0), "0 sliding_window"),
        *((dtype, [], (10, 0), dtype) for dtype in get_args(CacheDType) if dtype not in KV_DTYPES),
    ],
)
def test_a_cache_that_holds_no_plain_states_is_refused(
    dtype: str, skipped: list[str], capability: tuple[int, int] | None, named: str | None
) -> None:
    if named is None:
        check_cache(dtype, skipped, capability)
        return
    with pytest.raises(UnsupportedServer) as error:
        check_cache(dtype, skipped, capability)
    assert named in str(error.value.found)
    assert "auto" in str(error.value.remedy)


def test_the_kv_dtypes_are_vllms() -> None:
    assert set(KV_DTYPES) < set(get_args(CacheDType))


@pytest.mark.parametrize(
    ("cuda", "capability", "refused"),
    [(True, (8, 6), True), (True, (9, 0), False), (False, None, False)],
)
def test_the_device_at_hand_is_asked(
    monkeypatch: pytest.MonkeyPatch,
    cuda: bool,
    capability: tuple[int, int] | None,
    refused: bool,
) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: cuda)
    found = capability and DeviceCapability(*capability)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_: found)
    engine = config({}, {"cache_dtype": "fp8"})
    if refused:
        with pytest.raises(UnsupportedServer, match=r"8\.6"):
            check_engine(engine)
    else:
        check_engine(engine)


def test_each_half_of_the_connector_asks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[VllmConfig] = []
    monkeypatch.setattr(connector_module, "check_engine", asked.append)
    connector()
    assert [type(one) for one in asked] == [VllmConfig]


# The command


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments with which vLLM's own command was run."""
    runs: list[Any] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(runs.append))
    monkeypatch.setenv(server.START_METHOD, "fork")
    return runs


def test_vllms_command_gets_the_model_and_every_flag(served: list[Any]) -> None:
    server.main(["some/model", "--api-server-count", "3", "--kv-cache-dtype", "fp8_e5m2"])
    (args,) = served
    assert (args.model_tag, args.api_server_count) == ("some/model", 3)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pipeline-parallel-size", "2"], "tensor-parallel-size"),
        (["-dp", "2"], "load balancer"),
        (["--data-parallel-size", "2", "--data-parallel-rank", "0"], "load balancer"),
        (["--decode-context-parallel-size", "2", "-tp", "2"], "context parallel"),
        (["--kv-cache-dtype", "int8_per_token_head"], "int8_per_token_head"),
        (["--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "0", "1"], "0 1"),
        (["--grpc"], "gRPC"),
    ],
)
def test_arguments_that_cannot_work_stop_the_command(
    served: list[Any], flags: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        server.main(["some/model", *flags])
    assert named in str(stopped.value.code)
    assert "Remedy" in str(stopped.value.code)
    assert served == []


def test_a_front_end_without_plugins_stops_the_command(
    served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SystemExit) as stopped:
        server.main(["some/model"])
    assert "VLLM_USE_RUST_FRONTEND" in str(stopped.value.code)
    assert served == []
