"""Two servers of two models, each with a home of its own, pull one memory from one registry at the
same time: SmolLM2 its own copy, Gemma-3 through the map. Both answer as from a local file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import Server, awareness, serving
from registry_server import RegistryServer, registry_server

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

NAMES = ("smollm2-135m", "gemma3-270m")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture(scope="module")
def memory(own_memories: dict[str, tuple[Path, str]], registry: RegistryServer) -> Path:
    """The file of a memory of SmolLM2 that is in the registry."""
    path, _ = own_memories["smollm2-135m"]
    assert awareness("push", path, registry.reference()).status == 0
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tmp_path_factory.mktemp(name) for name in NAMES}


@pytest.fixture(scope="module")
def servers(
    models: dict[str, Path],
    wmatrix: Path,
    memory: Path,
    registry: RegistryServer,
    folders: dict[str, Path],
) -> Iterator[dict[str, Server]]:
    def started(name: str) -> Iterator[Server]:
        folder, flags = folders[name], ("--registry", registry.reference())
        if name == "gemma3-270m":
            flags += ("--wmatrix", str(wmatrix))
        home = {"AWARENESS_HOME": str(folder / "home")}
        return serving(models[name], folder / "store", folder / "log", *flags, **home)

    generators = {name: started(name) for name in NAMES}
    try:
        yield {name: next(generator) for name, generator in generators.items()}
    finally:
        for generator in generators.values():
            generator.close()


def answer(server: Server, memory: str, salt: str) -> dict[str, Any]:
    body = {"model": "served", "prompt": "\n\nIn short, the text says", "max_tokens": 8}
    # A passage that is re-read has a request of its own, which would load the memory before.
    body |= {"temperature": 0, "logprobs": 3, "cache_salt": salt}
    body |= {"memory": {"ids": [memory], "reread": 0}}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    report = response.json()["memory"]
    assert (report["plan"], report["temperature"]) == ("load", "cold")
    return response.json()


def test_both_pull_at_once_and_answer_as_from_a_local_file(
    servers: dict[str, Server], folders: dict[str, Path], memory: Path
) -> None:
    with ThreadPoolExecutor() as pool:
        pulled = dict(
            zip(NAMES, pool.map(lambda n: answer(servers[n], memory.stem, "a"), NAMES), strict=True)
        )
    for name, server in servers.items():
        (file,) = (folders[name] / "home/cache/served").glob(f"*/{memory.name}")
        assert file.read_bytes() == memory.read_bytes()
        assert not (folders[name] / "store" / memory.name).exists()
        (folders[name] / "store").mkdir(exist_ok=True)
        shutil.copy(memory, folders[name] / "store")
        httpx.delete(f"{server.url}/v1/memories/{memory.stem}").raise_for_status()
        local = answer(server, memory.stem, "b")
        assert pulled[name]["choices"] == local["choices"]
        assert pulled[name]["memory"]["origin"] == local["memory"]["origin"] == ["claimed"]
    assert pulled[NAMES[0]]["memory"]["retention"] == [None]  # a copy that nobody vouches for
