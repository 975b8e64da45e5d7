"""A vLLM server, stock or `awareness serve`, for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from awareness_vllm.serving.launch import PLUGIN, environment

STOCK = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model")
AWARENESS = (sys.executable, "-m", "awareness_vllm.cli.main", "serve")
NAME = "served"
START_SECONDS = 300.0


@dataclass
class Running:
    """A running server."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running(
    prefix: Sequence[str],
    model: Path,
    flags: Sequence[object],
    log: Path,
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Running]:
    """A server, started and ready, that is stopped afterwards; `meanwhile` runs while it starts.

    Raises:
        RuntimeError: it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*prefix, model, "--port", port, "--served-model-name", NAME, *flags]
    # Plugins as by default, but for ours; `awareness serve` allows ours itself.
    plugins = sorted({*environment({})["VLLM_PLUGINS"].split(",")} - {PLUGIN})
    environ = {**os.environ, "VLLM_PLUGINS": ",".join(plugins)}
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=environ)
    url = f"http://127.0.0.1:{port}"
    try:
        meanwhile()
        _wait(url, process, log)
        yield Running(url, log, process)
    finally:
        process.terminate()
        process.wait(60)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            httpx.get(f"{url}/v1/models", timeout=5)
            return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")
