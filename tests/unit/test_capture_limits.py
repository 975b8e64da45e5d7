"""Captures over HTTP: allowed, within a quota and the disk's room, and nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from memories_server import Server
from safetensors.torch import save_file
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from awareness_vllm.errors import AwarenessError, CaptureNotAllowed, StorageFull, TooManyLoads
from awareness_vllm.files import is_disk_full
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.serving import storage
from awareness_vllm.serving.api.capture import announce_capture
from awareness_vllm.serving.api.scratch import PREFIX, ScratchFolder
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.connector.capture_queue import NOT_WRITTEN
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import ANNOUNCE, FORGET, STATE
from awareness_vllm.serving.http import client_error
from awareness_vllm.serving.storage import GIB, CaptureLimits, bytes_in

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox"


class Capturing:
    """A server that allows captures, and a request to it whose text has `tokens` tokens."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.monkeypatch = server, monkeypatch
        self.dtype = torch.bfloat16
        server.engine.answers |= {ANNOUNCE: [None], FORGET: [None], STATE: [""]}
        self.limit(allowed=True, min_free=0)
        headers = {"Authorization": "Bearer sk-acme"}
        self.raw_request: Any = SimpleNamespace(app=server.app, headers=headers)

    def limit(self, **limits: Any) -> None:
        front = self.server.app.state.awareness
        object.__setattr__(front, "capture_limits", CaptureLimits(**limits))

    @property
    def scratch(self) -> Path:
        return self.server.app.state.awareness.engine_client.scratch.path

    def write_states(self) -> None:
        """What the worker does."""
        geometry = self.server.resolver.model.geometry
        states = {
            tensor_name(i, part): torch.zeros(self.tokens, layer.heads, layer.head_dim).to(
                self.dtype
            )
            for i, layer in enumerate(geometry.layers)
            for part in ("key", "value")
        }
        save_file(states, self.scratch / f"{self.key}.safetensors")

    def run(self, answer: Callable[[], Any] = lambda: JSONResponse({"text": "t"})) -> Any:
        """The response to a capture; the engine's `answer` comes once it has the request."""
        request = CompletionRequest(prompt=TEXT)

        async def engine() -> Any:
            assert request.kv_transfer_params is not None
            self.key = request.kv_transfer_params[CAPTURE_KEY]
            assert isinstance(request.prompt, list)
            self.tokens = len(request.prompt)
            self.write_states()
            return answer()

        async def capture() -> Any:
            one = await announce_capture(request, self.raw_request, "a name")
            return await one.finish(engine())

        return asyncio.run(capture())

    @property
    def left(self) -> list[str]:
        """Files that are left of captures, but for the folder's lock."""
        return [path.name for path in self.scratch.iterdir() if path.name != "lock"]


@pytest.fixture
def capturing(server: Server, monkeypatch: pytest.MonkeyPatch) -> Capturing:
    return Capturing(server, monkeypatch)


def test_captures_are_off_unless_the_operator_allows_them(capturing: Capturing) -> None:
    assert not ServingConfig(store="s").allow_capture
    capturing.limit()
    with pytest.raises(CaptureNotAllowed, match="--allow-capture") as refused:
        capturing.run()
    error: Any = client_error(refused.value)
    assert error.http_status == 403
    assert capturing.server.engine.calls == []


@pytest.mark.parametrize(
    "response",
    [JSONResponse({"text": "t"}), Response(b'{"text": "t"}', media_type="application/json")],
    ids=["vLLM 0.32", "vLLM 0.33"],
)
def test_a_capture_is_published_and_its_file_removed(
    capturing: Capturing, response: Response
) -> None:
    response = capturing.run(lambda: response)
    memory = response.headers["X-Awareness-Captured"]
    assert capturing.server.get(memory)["name"] == "a name"
    assert capturing.left == []
    assert capturing.server.admission.loads == {}


def test_an_engine_that_fails_leaves_no_states(capturing: Capturing) -> None:
    def fails() -> None:
        raise ValueError("failed")

    with pytest.raises(ValueError, match="failed"):
        capturing.run(fails)
    assert capturing.run(lambda: JSONResponse({}, status_code=400)).status_code == 400
    assert capturing.left == []
    assert capturing.server.admission.loads == {}
    assert [name for name, _ in capturing.server.engine.calls] == [ANNOUNCE, FORGET] * 2


def test_a_quota_and_free_space_are_kept(
    capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing.limit(allowed=True, quota=100, min_free=0)
    with pytest.raises(StorageFull, match="--capture-quota-gib"):
        capturing.run()
    assert capturing.server.engine.calls == []  # nothing was computed for it
    capturing.limit(allowed=True, min_free=1000 * GIB)
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 999 * GIB)
    with pytest.raises(StorageFull, match="--min-free-gib"):
        capturing.run()
    monkeypatch.undo()

    def others_capture() -> JSONResponse:
        capturing.limit(allowed=True, quota=100, min_free=0)
        return JSONResponse({})

    capturing.limit(allowed=True, min_free=0)
    with pytest.raises(StorageFull, match="--capture-quota-gib"):
        capturing.run(others_capture)
    assert capturing.left == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_capture_is_admitted_by_the_bytes_of_its_states(
    dtype: torch.dtype, capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing.dtype = dtype  # of `vllm serve --dtype`
    model = replace(capturing.server.resolver.model, dtype=dtype)
    monkeypatch.setattr(capturing.server.resolver, "model", model)
    sizes: list[int] = []
    monkeypatch.setattr(CaptureLimits, "check", lambda self, folder, size: sizes.append(size))
    capturing.run()
    expected, written = sizes
    assert expected == written


def test_captures_on_their_way_are_bounded(capturing: Capturing) -> None:
    capturing.server.admission.max_loads = 1
    held = asyncio.run(capturing.server.admission.admit_capture("another", 1))
    capturing.server.engine.answers["loaded"] = [[]]
    with pytest.raises(TooManyLoads):
        capturing.run()
    held.end()
    capturing.run()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_capture_is_said_so(
    code: int, capturing: Capturing, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing.server.engine.answers[STATE] = [NOT_WRITTEN + os.strerror(code)]
    with pytest.raises(StorageFull, match=os.strerror(code)) as full:
        capturing.run()
    error: Any = client_error(full.value)
    assert error.http_status == 507
    capturing.server.engine.answers[STATE] = ["another error"]
    with pytest.raises(AwarenessError, match="another error"):
        capturing.run()
    capturing.server.engine.answers[STATE] = [""]

    def publish(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("awareness_vllm.serving.api.capture.publish", publish)
    with pytest.raises(StorageFull, match=os.strerror(code)):
        capturing.run()
    assert capturing.left == []


def test_every_writers_full_disk_is_known(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as full, open("/dev/full", "wb", 0) as file:
        file.write(b"x")
    assert is_disk_full(full.value)
    with pytest.raises(Exception, match="os error") as missing:
        save_file({"a": torch.ones(1)}, tmp_path / "no folder" / "a")
    assert not is_disk_full(missing.value)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))


def test_a_stores_bytes_are_its_files(tmp_path: Path) -> None:
    assert bytes_in(tmp_path / "none yet") == 0
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/bin/sh")
    assert bytes_in(tmp_path) == 10


# The folder of captured states

SERVER = """
import sys, time
from awareness_vllm.serving.api.scratch import ScratchFolder
folder = ScratchFolder()
print(folder.path, flush=True)
time.sleep(float(sys.argv[1]))
"""


def test_a_killed_servers_folder_is_swept_and_a_live_ones_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / f"{PREFIX}somebodys").mkdir()  # without a lock: not ours
    live, killed = (
        subprocess.Popen([sys.executable, "-c", SERVER, "60"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    folders = []
    for server in (live, killed):
        assert server.stdout is not None
        folders.append(Path(server.stdout.readline().strip()))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (folders[1] / "states.safetensors").write_bytes(b"x")
    mine = ScratchFolder()
    assert [folder.is_dir() for folder in folders] == [True, False]
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o700
    live.send_signal(signal.SIGINT)  # an orderly end
    live.wait()
    mine.end()
    assert os.listdir(tmp_path) == [f"{PREFIX}somebodys"]
