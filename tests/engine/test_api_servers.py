"""Several API servers before one engine: each has a front end of its own, and they share the
workers' memories. What cannot work does not start."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from harness import CLI, Server, captured, serving

pytestmark = [pytest.mark.engine, pytest.mark.nightly]

TEXT = (
    "The library of Ardenne opens at nine. Its oldest book is an atlas of 1602. "
    "Anna Kowalski looks after the maps, and Otto Brandt after the reading room. "
) * 3
QUESTION = "\nQuestion: Who looks after the maps?\nAnswer:"
COUNT = 2


@pytest.fixture(scope="module")
def memory(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    store = tmp_path_factory.mktemp("several") / "store"
    store.mkdir()
    return captured(smollm2, TEXT, store), store


@pytest.fixture(scope="module")
def server(
    gemma3: Path, wmatrix: Path, memory: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--wmatrix", wmatrix, "--api-server-count", COUNT)
    yield from serving(gemma3, memory[1], log, *flags)


def test_every_api_server_answers_with_the_memory(server: Server, memory: tuple[str, Path]) -> None:
    body = {"model": "served", "prompt": QUESTION, "max_tokens": 4, "temperature": 0}
    body |= {"memory_ids": [memory[0]]}
    texts, servers = set(), set()
    for _ in range(24):  # the kernel deals connections out
        with httpx.Client(timeout=60) as client:
            answer = client.post(f"{server.url}/v1/completions", json=body)
            servers.add(answering(server, answer))
        assert answer.status_code == 200, answer.text
        report = answer.json()["memory"]
        assert (report["ids"], report["plan"]) == ([memory[0]], "load")
        assert report["temperature"] != "recomputed"
        texts.add(answer.json()["choices"][0]["text"])
    assert len(texts) == 1, texts
    assert len(servers) == COUNT
    log = server.log.read_text()
    assert log.count("memories are served from") == COUNT
    assert log.count(".wmatrix loaded") == 1


def answering(server: Server, answer: httpx.Response) -> int:
    """The process at the other end of an answer's connection, which is still open."""
    _, port = answer.extensions["network_stream"].get_extra_info("client_addr")
    (pid,) = (
        process.pid
        for process in psutil.Process(server.process.pid).children(recursive=True)
        for connection in process.net_connections("tcp")
        if connection.raddr and connection.raddr.port == port
    )
    return pid


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--data-parallel-size", "2"), "load balancer"),
        (("--pipeline-parallel-size", "2"), "pipeline"),
        (("--kv-cache-dtype", "int8_per_token_head"), "int8_per_token_head"),
    ],
)
def test_what_cannot_work_does_not_start(
    gemma3: Path, memory: tuple[str, Path], flags: tuple[str, ...], named: str
) -> None:
    command = [*CLI, "serve", str(gemma3), "--store", str(memory[1]), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Remedy" in done.stderr
    assert "weights" not in done.stdout + done.stderr
