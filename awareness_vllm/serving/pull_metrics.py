"""Pulls on the front end's /metrics."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class PullMetrics:
    """Prometheus metrics of the memories that this process pulls."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.bytes = Counter(
            "vllm:awareness_pull_bytes",
            "Bytes that were pulled from the registry.",
            registry=registry,
        )
        self.seconds = Histogram(
            "vllm:awareness_pull_seconds",
            "Seconds that a memory's pull took, up to its place in the cache.",
            buckets=BUCKETS,
            registry=registry,
        )
        self.failures = Counter(
            "vllm:awareness_pull_failures",
            "Pulls that failed, by exception.",
            ["reason"],
            registry=registry,
        )

    @classmethod
    @functools.cache
    def of_process(cls) -> PullMetrics:
        """This process's metrics: there is one of each name."""
        return cls()

    @contextmanager
    def pull(self, size: int) -> Iterator[None]:
        """Count what happens within as a pull of so many bytes, or as a failure."""
        began = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self.failures.labels(type(error).__name__).inc()
            raise
        self.seconds.observe(time.perf_counter() - began)
        self.bytes.inc(size)
