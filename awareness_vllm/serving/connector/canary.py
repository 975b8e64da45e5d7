"""A worker's part in checking what strangers claim: a package's first states, a map's sink."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor
from vllm.logger import init_logger

from awareness_vllm.align.agreement import check_agreement, least_agreement
from awareness_vllm.align.realign import AlignedMemory, Realignment
from awareness_vllm.errors import AwarenessError, UnsupportedModel, WMatrixCorrupt
from awareness_vllm.serving.connector.capture_queue import PENDING, CaptureQueue, keys_and_values
from awareness_vllm.serving.connector.loader import LoadedSource, MemoryLoader
from awareness_vllm.serving.params import Part

logger = init_logger("vllm.awareness.canary")

SINK = 0.2
"""Relative error of a sink's states: a fit computes them in float32 and with unquantised weights,
which a server need not have."""


class Canary:
    """Comparisons with states that the model has just computed, by the key of their capture."""

    def __init__(self, loader: MemoryLoader, captures: CaptureQueue) -> None:
        self.loader, self.captures = loader, captures
        self.sources: dict[str, Future[LoadedSource]] = {}

    def check_memory(self, capture: str, part: Part, tenant: str) -> str | list[str]:
        """Compare a memory's first tokens with captured ones: PENDING while its file is read, then
        the complaint about its states and the error that kept them from being compared, "" for
        none: an exception would cross the engine as a mere text."""
        source = self.sources.get(capture)
        if source is None:
            source = self.sources[capture] = self.loader.read(part, tenant)
        if not source.done():
            return PENDING
        del self.sources[capture]
        self.loader.reads.release(source)
        complaint: list[str] = []
        error = _message(lambda: complaint.append(self._complaint(capture, part, source.result())))
        return ["".join(complaint), error]

    def _complaint(self, capture: str, part: Part, source: LoadedSource) -> str:
        """What is wrong with a memory's first keys; "" where nothing is, or can be said."""
        if (own := self.own_states(capture)) is None:
            return ""
        own_keys, _ = own
        source.check()
        wmatrix = self.loader.wmatrices.get(part.wmatrix)
        manifest = wmatrix.manifest if wmatrix else None
        skip = len(manifest.sink) if manifest else 0
        keys = self.first_keys(part, source, len(own_keys[0]))
        least = least_agreement(manifest)
        first, own_first = ([key[skip:] for key in side] for side in (keys, own_keys))
        return _message(lambda: check_agreement(part.memory, first, own_first, least))

    def first_keys(self, part: Part, source: LoadedSource, tokens: int) -> list[Tensor]:
        """The keys of a memory's first tokens in the target's cache, per layer [T, H, D]."""
        memory = source.memory
        if memory is None:
            assert source.package is not None
            assert source.source is not None
            wmatrix = self.loader.wmatrices[part.wmatrix]
            work = Realignment(
                source.package,
                wmatrix,
                source.ids[:tokens],
                source.source[: tokens - len(wmatrix.manifest.sink)],
                lambda ids: self.loader.embed(ids).cpu(),
                dtype=self.loader.dtype,
            )
            while not work.step():
                pass
            memory = work.memory
        assert isinstance(memory, AlignedMemory)  # what a file holds
        return [key[:tokens] for key in memory.keys]

    def check_sink(self, capture: str, wmatrix: str) -> str:
        """Compare a map's sink with captured states; "" or the error's message."""
        return _message(lambda: self._check_sink(capture, wmatrix))

    def _check_sink(self, capture: str, wmatrix: str) -> None:
        if (own := self.own_states(capture)) is None:
            return
        map_ = self.loader.wmatrices[wmatrix]
        for found, expected in zip((map_.sink_keys, map_.sink_values), own, strict=True):
            for i, (one, other) in enumerate(zip(found, expected, strict=True)):
                error = float((one.float() - other.float()).norm() / other.float().norm())
                if not error <= SINK:
                    raise WMatrixCorrupt(
                        "the W-Matrix begins every memory with states that are not the model's own",
                        found=f"a relative error of {error:.2g} in layer {i} of its sink",
                        expected=f"at most {SINK:g}",
                        remedy="fit it again on this model",
                    )

    def own_states(self, capture: str) -> tuple[list[Tensor], list[Tensor]] | None:
        """The model's own keys and values; None where this server cannot read its cache back (fp8,
        several ranks): then nothing can be compared. Raises AwarenessError."""
        try:
            states = self.captures.collect(capture)
        except AwarenessError as error:
            if not isinstance(error.__cause__, UnsupportedModel):
                raise
            logger.warning("what strangers claim cannot be checked here: %s", error.__cause__)
            return None
        return keys_and_values(states, len(states) // 2)


def _message(check: Callable[[], None]) -> str:
    """The message of the error that a check ends in, "" for none."""
    try:
        check()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
