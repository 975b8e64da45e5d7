"""What all maps on a device share: rotary tables, and lanes beside the engine's own stream.

A lane is a stream, a thread and a pinned buffer with its copy on the device. Chunks of a memory are
staged, uploaded and encoded on lanes, so neither the engine's thread nor its stream waits for them,
and no more memory is in use than the lanes have, however long the memory is.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from awareness_vllm.models.rope import Rotations

LANES = 2
"""Chunks that are on their way at once: one is staged while another is uploaded and encoded."""
WRITES = 2
"""Staging buffers that writes are uploaded through in turn."""
PADDING = 256
"""Bytes that a staged tensor's place is a multiple of: what kernels load at once is aligned."""

Mark = torch.cuda.Event | None
"""A place in a stream; None on a device without streams, where everything has been done."""


class SideStream:
    """A device's queue of work beside the engine's own. A device without streams (a CPU) does its
    work when it is given, so there is nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """What is launched meanwhile, by this thread, goes to this stream."""
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def mark(self) -> Mark:
        """A mark behind what this stream was given so far."""
        return None if self.stream is None else self.stream.record_event()

    def mark_engine(self) -> Mark:
        """A mark behind what the calling thread's current stream was given so far."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def follow(self, mark: Mark) -> None:
        """This stream goes on behind a mark; the host does not wait."""
        if self.stream is not None and mark is not None:
            self.stream.wait_event(mark)

    def hold_engine(self, mark: Mark) -> None:
        """The calling thread's current stream goes on behind a mark; the host does not wait."""
        if mark is not None:
            torch.cuda.current_stream(self.device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        """The host waits for a mark."""
        if mark is not None:
            mark.synchronize()


class Staging:
    """A pinned buffer and its copy on the device, which are used again and again."""

    def __init__(self, stream: SideStream) -> None:
        self.stream = stream
        self.host = self.device = torch.empty(0, dtype=torch.uint8)
        self.uploaded: Mark = None
        self.used: Mark = None

    @property
    def bytes(self) -> int:
        return self.device.nbytes

    def reserve(self, size: int) -> None:
        """Have room for `size` bytes. Raises torch.OutOfMemoryError."""
        if size > self.bytes:
            on_device = self.stream.device
            self.device = torch.empty(size, dtype=torch.uint8, device=on_device)
            pinned = on_device.type == "cuda"
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def upload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The device's copies of tensors on the host, which the stream has in its order; they hold
        until the next upload."""
        ends = list(itertools.accumulate(map(padded_bytes, tensors), initial=0))
        self.reserve(ends[-1])
        self.stream.wait(self.uploaded)
        for tensor, begin in zip(tensors, ends, strict=False):
            _place(self.host, begin, tensor).copy_(tensor)
        with self.stream.launching():
            self.stream.follow(self.used)
            self.device[: ends[-1]].copy_(self.host[: ends[-1]], non_blocking=True)
        self.uploaded = self.stream.mark()
        return [
            _place(self.device, begin, tensor) for tensor, begin in zip(tensors, ends, strict=False)
        ]

    def begin_use(self) -> None:
        """The engine's stream goes on when the copies are there."""
        self.stream.hold_engine(self.uploaded)

    def end_use(self) -> None:
        """What the engine's stream was given so far is the last that reads the copies."""
        self.used = self.stream.mark_engine()


class DeviceWorkspace:
    """The rotary tables of `positions` target positions, one for each distinct descriptor, the
    lanes that chunks are encoded on, and the staging buffers that writes are uploaded through.

    Args:
        positions: in use by the target.
    """

    def __init__(self, device: torch.device | str, positions: int) -> None:
        self.device = torch.device(device)
        self.positions = positions
        self.rotations = Rotations(torch.arange(positions), self.device)
        self.lanes = [Staging(SideStream(self.device)) for _ in range(LANES)]
        writing = SideStream(self.device)
        self.writes = [Staging(writing) for _ in range(WRITES)]
        self.next_write = itertools.cycle(self.writes)
        self.free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        for lane in self.lanes:
            self.free.put(lane)
        self.threads = ThreadPoolExecutor(LANES, "awareness-lane")
        self.jobs: list[Future[None]] = []

    @property
    def running(self) -> list[Future[None]]:
        """The jobs on the lanes."""
        self.jobs = [job for job in self.jobs if not job.done()]
        return self.jobs

    def reserve(self, chunk: int, write: int) -> None:
        """Have room for a chunk's, and a write's, bytes. Raises torch.OutOfMemoryError."""
        for lane in self.lanes:
            lane.reserve(chunk)
        for staging in self.writes:
            staging.reserve(write)

    def submit(self, job: Callable[[Staging], None]) -> Future[None] | None:
        """A job begun on a free lane, in its thread; None where all lanes are busy."""
        try:
            lane = self.free.get_nowait()
        except queue.Empty:
            return None

        def run() -> None:
            try:
                job(lane)
            finally:
                self.free.put(lane)

        job_result = self.threads.submit(run)
        self.jobs = [*self.running, job_result]
        return job_result


def padded_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor's place in a staging buffer."""
    return padded(tensor.numel() * tensor.element_size())


def padded(size: int) -> int:
    """A number of bytes, rounded up to the next multiple of PADDING."""
    return -(-size // PADDING) * PADDING


def _place(buffer: Tensor, begin: int, like: Tensor) -> Tensor:
    """The place of a tensor in a buffer of bytes, as a tensor of its dtype and shape."""
    size = like.numel() * like.element_size()
    return buffer[begin : begin + size].view(like.dtype).view(like.shape)
