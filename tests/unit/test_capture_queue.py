"""Captures: only announced ones, whole or not at all, and an error is reported once."""

from __future__ import annotations

import errno
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from awareness_vllm.errors import AwarenessError
from awareness_vllm.serving.connector import capture_queue as module
from awareness_vllm.serving.connector.capture_queue import (
    NOT_WRITTEN,
    PENDING,
    CaptureQueue,
    States,
    capture_to,
    keys_and_values,
)
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY

pytestmark = pytest.mark.unit

STATES = {"layers.0.key": torch.ones(3, 1, 2), "layers.0.value": torch.zeros(3, 1, 2)}


def states() -> States:
    return STATES


def broken() -> States:
    raise RuntimeError("the blocks are gone")


def status_of(captures: CaptureQueue, name: str) -> str:
    """A capture's status once the files are written."""
    captures.thread.shutdown()
    return captures.status(name)


def test_only_announced_captures_are_read_back() -> None:
    captures = CaptureQueue()
    assert not captures.expects("forged")
    captures.announce("real", "")
    assert captures.expects("real")
    captures.discard("real")
    assert not captures.expects("real")


@pytest.mark.parametrize("forged", ["/etc/passwd", ":/etc/passwd", "0" * 64 + ":/etc/passwd"])
def test_no_client_can_name_a_file(forged: str, tmp_path: Path) -> None:
    captures = CaptureQueue()
    assert not captures.expects(forged)
    signed = capture_to(tmp_path / "states")[CAPTURE_KEY]
    assert captures.expects(signed)
    assert not captures.expects(f"{signed}.other")


def test_a_capture_goes_into_its_file_and_is_reported_once(tmp_path: Path) -> None:
    captures, path = CaptureQueue(), tmp_path / "states"
    captures.announce("a", str(path))
    assert captures.status("a") == PENDING
    captures.capture("a", states)
    assert status_of(captures, "a") == ""
    assert torch.equal(load_file(path)["layers.0.key"], STATES["layers.0.key"])
    assert captures.status("a") == PENDING
    assert [file.name for file in tmp_path.iterdir()] == ["states"]


def test_a_capture_without_a_file_is_collected_once() -> None:
    captures = CaptureQueue()
    captures.announce("head", "")
    captures.capture("head", states)
    (key,), (value,) = keys_and_values(captures.collect("head"), 1)
    assert torch.equal(key, STATES["layers.0.key"])
    assert torch.equal(value, STATES["layers.0.value"])
    with pytest.raises(AwarenessError, match="nothing was captured"):
        captures.collect("head")


@pytest.mark.parametrize("path", ["", "states"])
def test_an_error_while_reading_is_reported(path: str, tmp_path: Path) -> None:
    captures = CaptureQueue()
    captures.announce("a", str(tmp_path / path) if path else "")
    captures.capture("a", broken)
    if path:
        assert status_of(captures, "a") == "the blocks are gone"
    else:
        with pytest.raises(AwarenessError, match="the blocks are gone"):
            captures.collect("a")
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_is_reported(tmp_path: Path) -> None:
    captures = CaptureQueue()
    captures.announce("a", str(tmp_path / "no such folder" / "states"))
    captures.capture("a", states)
    assert "No such file" in status_of(captures, "a")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
    ],
)
def test_a_disk_that_takes_no_capture_is_reported_as_such(
    error: Exception, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", full)
    captures = CaptureQueue()
    captures.announce("a", str(tmp_path / "states"))
    captures.capture("a", states)
    assert status_of(captures, "a") == NOT_WRITTEN + os.strerror(code)


@pytest.mark.parametrize("when", ["queued", "being written", "written"])
def test_what_is_forgotten_leaves_no_file(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def slowly(states: States, path: Path) -> None:
        began.set()
        assert go_on.wait(30)
        path.write_bytes(b"states")

    monkeypatch.setattr(module, "save_file", slowly)
    captures = CaptureQueue()
    for key in ("before", "a") if when == "queued" else ("a",):
        captures.announce(key, str(tmp_path / key))
        captures.capture(key, states)
    assert began.wait(30)
    if when == "written":
        go_on.set()
        captures.results["a"].result(30)
        assert (tmp_path / "a").exists()
    captures.discard("a")
    go_on.set()
    captures.thread.shutdown()
    assert [path.name for path in tmp_path.iterdir()] == ["before"] * (when == "queued")
    assert (captures.files.keys() | captures.results.keys()) - {"before"} == set()


def test_an_offline_engine_writes_before_it_goes_on(tmp_path: Path) -> None:
    captures, path = CaptureQueue(), tmp_path / "states"
    captures.capture(capture_to(path)[CAPTURE_KEY], states)
    assert set(load_file(path)) == set(STATES)


def numbered(begin: int, end: int) -> States:
    return {"layers.0.key": torch.arange(begin, end).view(-1, 1, 1)}


@pytest.mark.parametrize(
    "steps",
    [
        [(0, 3), (3, 5)],
        [(0, 3), (3, 4), (0, 5)],  # preempted, and computed again
        [(0, 3), (3, 4), (2, 4), (4, 5)],  # preempted, the first two from the prefix cache
    ],
)
def test_the_steps_of_a_prompt_are_joined(steps: list[tuple[int, int]]) -> None:
    captures = CaptureQueue()
    captures.announce("head", "")
    for begin, end in steps:
        assert captures.expects("head")
        captures.capture("head", partial(numbered, begin, end), begin, last=end == 5)
    assert captures.collect("head")["layers.0.key"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert captures.parts == {}


@pytest.mark.parametrize("offline", [False, True])
def test_a_prompt_of_which_a_step_is_missing_is_not_captured(tmp_path: Path, offline: bool) -> None:
    captures, path = CaptureQueue(), tmp_path / "states"
    key = capture_to(path)[CAPTURE_KEY] if offline else "key"
    if not offline:
        captures.announce(key, str(path))
    captures.capture(key, broken, 0, last=False)
    assert not captures.expects(key)
    assert captures.status(key) == "the blocks are gone"
    assert (captures.parts, list(tmp_path.iterdir())) == ({}, [])


def test_a_capture_given_up_leaves_nothing() -> None:
    captures = CaptureQueue()
    captures.announce("head", "")
    captures.capture("head", partial(numbered, 0, 3), 0, last=False)
    captures.discard("head")
    assert (captures.parts, captures.announced, captures.results) == ({}, {}, {})
