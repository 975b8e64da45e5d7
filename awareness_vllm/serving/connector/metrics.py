"""Outcomes of loads: for the operator on vLLM's /metrics, for the client in its response.

Every worker sends the scheduler half its outcome of each load. There they become one, so a load
counts once however many ranks took part, and failed if it failed on any.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.editions import FAILED, MADE
from awareness_vllm.serving.connector.worker import Loaded
from awareness_vllm.serving.params import LoadParams, is_edition

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

TEMPERATURES = ("hot", "warm", "cold")
"""Of a load, from the cheapest to the dearest."""
USED = "used"
EDITION_OUTCOMES = (MADE, FAILED, USED)
RECOMPUTED = "recomputed"
"""Stands for a temperature where a load failed and vLLM computed the memory's tokens itself."""
ENTRIES = ("loads", "failures", "requests", "editions")
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Seconds: from a GPU's warm loads to a CPU's cold ones of long memories."""


@dataclass(frozen=True)
class Failed:
    """A load that raised; `reason` is the exception's type name."""

    reason: str


Outcome = Loaded | Failed
ALL_CACHED = Loaded("hot", tokens=0, bytes=0, seconds=0.0)
"""The prefix cache had all that the memory would have brought."""


@dataclass
class StepOutcomes(KVConnectorWorkerMetadata):
    """One step's outcomes by request ID, of one worker or, aggregated, of several; and what came of
    editions (`made`, `failed`), with the `bytes` that are kept of them."""

    by_request: dict[str, Outcome] = field(default_factory=dict)
    editions: dict[str, int] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepOutcomes:
        assert isinstance(other, StepOutcomes)
        merged = dict(self.by_request)
        for request_id, outcome in other.by_request.items():
            first = merged.get(request_id)
            merged[request_id] = outcome if first is None else merge_ranks(first, outcome)
        # Each worker keeps every edition, its own heads or layers of it.
        names = self.editions.keys() | other.editions.keys()
        both = [self.editions, other.editions]
        editions = {name: max(one.get(name, 0) for one in both) for name in names}
        return StepOutcomes(merged, editions)


def merge_ranks(one: Outcome, other: Outcome) -> Outcome:
    """The outcome of a load that two workers shared: each wrote its own heads or layers, and it was
    done when the slower one was."""
    if isinstance(one, Failed):
        return one
    if isinstance(other, Failed):
        return other
    return Loaded(
        temperature=max(one.temperature, other.temperature, key=TEMPERATURES.index),
        tokens=max(one.tokens, other.tokens),
        bytes=one.bytes + other.bytes,
        seconds=max(one.seconds, other.seconds),
    )


@dataclass
class LoadStats(KVConnectorStats):
    """The loads since the statistics were last taken. `data` crosses processes as plain lists:
    `loads` of `Loaded` as dicts, `failures` of reasons, `requests` of temperatures (or
    RECOMPUTED), `editions` of what came of them (`StepOutcomes`), and of requests that `used`
    some."""

    def __post_init__(self) -> None:
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data: dict[str, list[Any]] = {name: [] for name in ENTRIES}

    def record(self, outcome: Outcome) -> None:
        if isinstance(outcome, Failed):
            self.data["failures"].append(outcome.reason)
        else:
            self.data["loads"].append(asdict(outcome))

    def aggregate(self, other: KVConnectorStats) -> LoadStats:
        """Both together; neither changes, for vLLM's loggers share them."""
        return LoadStats({name: entries + other.data[name] for name, entries in self.data.items()})

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def reduce(self) -> dict[str, int | float]:
        """The summary for vLLM's log line."""
        loads = [Loaded(**load) for load in self.data["loads"]]
        seconds = [load.seconds for load in loads]
        return {
            "Memory loads": len(loads),
            **{t.capitalize(): sum(load.temperature == t for load in loads) for t in TEMPERATURES},
            "Tokens loaded": sum(load.tokens for load in loads),
            "MB loaded": round(sum(load.bytes for load in loads) / 2**20, 3),
            "Avg load time (ms)": round(1e3 * sum(seconds) / max(1, len(seconds)), 3),
            "Max load time (ms)": round(1e3 * max(seconds, default=0.0), 3),
            "Failed loads": len(self.data["failures"]),
        }


class LoadMetrics(KVConnectorPromMetrics):
    """`LoadStats` as Prometheus metrics, with vLLM's labels (model, engine) and one of ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make_counter: Any = self._counter_cls
        make_histogram: Any = self._histogram_cls

        def counter(name: str, text: str, label: str = "temperature") -> Any:
            return make_counter(f"vllm:awareness_{name}", text, labelnames=[*labelnames, label])

        self.loads = counter(
            "loads", "Loads of memories into KV blocks; none where the prefix cache had all tokens."
        )
        self.tokens = counter("tokens", "Prompt tokens that were loaded, and so not prefilled.")
        self.bytes = counter("bytes", "Bytes of KV cache that loads wrote, on all ranks together.")
        self.seconds = make_histogram(
            "vllm:awareness_load_seconds",
            "Seconds that a load took, on the slowest rank.",
            labelnames=[*labelnames, "temperature"],
            buckets=list(BUCKETS),
        )
        self.requests = counter(
            "requests",
            "Ended requests with a memory, by temperature; hot too where nothing had to be loaded.",
        )
        self.failures = counter(
            "failures",
            "Loads that failed, so that vLLM computed the memory's tokens, by exception.",
            "reason",
        )
        self.editions = counter(
            "editions",
            "Editions that were made, or came to nothing, and requests that used some.",
            "outcome",
        )
        make_gauge: Any = self._gauge_cls
        self.edition_bytes = make_gauge(
            "vllm:awareness_edition_bytes",
            "Bytes of editions in host memory, on one rank.",
            labelnames=list(labelnames),
            multiprocess_mode="mostrecent",  # of several API servers, whichever heard of it last
        )
        self.start_at_zero()

    def start_at_zero(self) -> None:
        """A series that first appears with its first event hides that event from `rate`."""
        for engine in self.per_engine_labelvalues.values():
            for temperature in TEMPERATURES:
                for metric in (self.loads, self.tokens, self.bytes, self.seconds):
                    metric.labels(*engine, temperature)
            for temperature in (*TEMPERATURES, RECOMPUTED):
                self.requests.labels(*engine, temperature)
            for outcome in EDITION_OUTCOMES:
                self.editions.labels(*engine, outcome)
            self.edition_bytes.labels(*engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for load in (Loaded(**entry) for entry in transfer_stats_data["loads"]):
            labels = (*engine, load.temperature)
            self.loads.labels(*labels).inc()
            self.tokens.labels(*labels).inc(load.tokens)
            self.bytes.labels(*labels).inc(load.bytes)
            self.seconds.labels(*labels).observe(load.seconds)
        for reason in transfer_stats_data["failures"]:
            self.failures.labels(*engine, reason).inc()
        for temperature in transfer_stats_data["requests"]:
            self.requests.labels(*engine, temperature).inc()
        for entry in transfer_stats_data["editions"]:
            for outcome in EDITION_OUTCOMES:
                self.editions.labels(*engine, outcome).inc(entry.get(outcome, 0))
            if "bytes" in entry:
                self.edition_bytes.labels(*engine).set(entry["bytes"])


class LoadTracker:
    """The scheduler half's record of loads: the statistics since they were last taken, the ranks'
    outcomes of loads that have not ended on all of them, and the outcome for each request that
    lives, None while its load is under way.

    A request that is preempted loads again. Its last load counts, for its states are the ones that
    the answer was made with; after a failed one there is no other. The server's own requests, for
    passages, are in no statistics.
    """

    def __init__(self) -> None:
        self.stats = LoadStats()
        self.outcomes: dict[str, Outcome | None] = {}
        self.by_rank: dict[str, Outcome] = {}
        self.cached: dict[str, int] = {}
        self.uncounted: set[str] = set()

    def start(self, request_id: str, cached: int = 0, *, counted: bool = True) -> None:
        """A load is under way, after so many tokens that the prefix cache had."""
        if not counted:
            self.uncounted.add(request_id)
        self.outcomes.setdefault(request_id, None)
        self.cached[request_id] = cached

    def record(self, outcomes: Mapping[str, Outcome], ended: Iterable[str]) -> None:
        """Record the ranks' outcomes by request ID, and which loads have ended on all ranks.

        Of an aborted request they arrive after its end: they count, but are not kept.
        """
        for request_id, outcome in outcomes.items():
            other = self.by_rank.get(request_id)
            self.by_rank[request_id] = outcome if other is None else merge_ranks(other, outcome)
        for request_id in ended:
            merged = self.by_rank.pop(request_id, None)  # None where it was cancelled on all ranks
            if merged is not None and request_id not in self.uncounted:
                self.stats.record(merged)
            if request_id not in self.outcomes:
                self.uncounted.discard(request_id)
            elif merged is not None:
                self.outcomes[request_id] = merged

    def record_editions(self, outcomes: Mapping[str, int]) -> None:
        """Record what came of editions."""
        if outcomes:
            self.stats.data["editions"].append(dict(outcomes))

    def record_failure(self, request_id: str, error: Exception) -> None:
        """Record a load that never began. The scheduler may try many times: it counts once."""
        if not isinstance(self.outcomes.get(request_id), Failed):
            self.start(request_id)
            self.record({request_id: Failed(type(error).__name__)}, [request_id])

    def report(self, request: Request, plan: LoadParams | None) -> dict[str, Any] | None:
        """The report on a request that ends, as its response's `kv_transfer_params`; None for one
        without a load plan, or that ended before its memory came."""
        all_cached = ALL_CACHED if request.num_computed_tokens > 0 else None
        outcome = self.outcomes.get(request.request_id, all_cached)
        if outcome is None or plan is None:
            return None
        report = load_report(outcome, self.cached.get(request.request_id, 0))
        if not plan.is_internal:
            self.stats.data["requests"].append(report["temperature"])
            if report["temperature"] != RECOMPUTED and any(is_edition(p.key) for p in plan.parts):
                self.record_editions({USED: 1})
        return {PARAMS_KEY: report}

    def finish(self, request_id: str) -> None:
        """Forget a request."""
        if self.outcomes.pop(request_id, None) is not None:
            self.uncounted.discard(request_id)  # else its load is still under way
        self.cached.pop(request_id, None)

    def take_stats(self) -> LoadStats | None:
        """The statistics since the last call, None where nothing happened."""
        taken, self.stats = self.stats, LoadStats()
        return None if taken.is_empty() else taken


def load_report(outcome: Outcome, cached: int = 0) -> dict[str, Any]:
    """One request's outcome, as its client reads it. After a failed load, `cached` tokens of the
    memory may still be aligned ones, from the prefix cache."""
    if isinstance(outcome, Failed):
        report = {"temperature": RECOMPUTED, "reason": outcome.reason}
        return {**report, "cached_tokens": cached} if cached else report
    return {
        "temperature": outcome.temperature,
        "loaded_tokens": outcome.tokens,
        "seconds": round(outcome.seconds, 6),
    }
