"""Outcomes of loads as statistics: added up over ranks and steps, on /metrics and the dashboard."""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorLogging,
    KVConnectorProm,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from awareness_vllm.serving.config import ServingConfig, transfer_config
from awareness_vllm.serving.connector.connector import AwarenessConnector
from awareness_vllm.serving.connector.metrics import (
    RECOMPUTED,
    TEMPERATURES,
    Failed,
    LoadStats,
    LoadTracker,
    Outcome,
    StepOutcomes,
    merge_ranks,
)
from awareness_vllm.serving.connector.worker import Loaded
from awareness_vllm.serving.pull_metrics import PullMetrics

pytestmark = pytest.mark.unit

DASHBOARD = Path(__file__).parents[2] / "docs/grafana/awareness.json"
LABELS = ["model_name", "engine"]
COLD = Loaded("cold", tokens=800, bytes=3 * 2**20, seconds=0.5)
WARM = Loaded("warm", tokens=800, bytes=3 * 2**20, seconds=0.02)
HOT = Loaded("hot", tokens=40, bytes=2**18, seconds=0.004)

loads = st.builds(
    Loaded,
    temperature=st.sampled_from(TEMPERATURES),
    tokens=st.integers(0, 10**6),
    bytes=st.integers(0, 10**12),
    seconds=st.floats(0, 1e3),
)
outcomes = loads | st.builds(Failed, st.sampled_from(["PackageCorrupt", "OSError"]))


def stats_of(*recorded: Outcome, requests: tuple[str, ...] = ()) -> LoadStats:
    stats = LoadStats()
    for outcome in recorded:
        stats.record(outcome)
    stats.data["requests"].extend(requests)
    return stats


# The statistics


@given(recorded=st.lists(outcomes), cuts=st.lists(st.integers(0, 20), max_size=4))
def test_any_split_of_the_steps_aggregates_to_the_same(
    recorded: list[Outcome], cuts: list[int]
) -> None:
    whole = stats_of(*recorded)
    edges = [0, *sorted(cuts), len(recorded)]
    parts = [stats_of(*recorded[a:b]) for a, b in itertools.pairwise(edges)]
    sizes = [len(part.data["loads"]) for part in parts]
    total = functools.reduce(lambda a, b: a.aggregate(b), parts)
    assert total == whole
    assert total.reduce() == whole.reduce()
    assert [len(part.data["loads"]) for part in parts] == sizes


@given(recorded=st.lists(outcomes), requests=st.lists(st.sampled_from(TEMPERATURES)))
def test_statistics_survive_the_way_to_the_front_end(
    recorded: list[Outcome], requests: list[str]
) -> None:
    stats = stats_of(*recorded, requests=tuple(requests))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict()))
    arrived = AwarenessConnector.build_kv_connector_stats(sent)
    assert arrived == stats
    assert arrived.is_empty() == (not recorded and not requests)


def test_the_summary_of_an_interval() -> None:
    summary = stats_of(COLD, WARM, HOT, WARM, Failed("OSError")).reduce()
    assert summary == {
        "Memory loads": 4,
        "Hot": 1,
        "Warm": 2,
        "Cold": 1,
        "Tokens loaded": 2440,
        "MB loaded": 9.25,
        "Avg load time (ms)": 136.0,
        "Max load time (ms)": 500.0,
        "Failed loads": 1,
    }
    assert set(LoadStats().reduce().values()) == {0}


def test_stats_that_are_reset_are_empty_and_their_own() -> None:
    stats = stats_of(COLD)
    taken = stats.to_dict()
    stats.reset()
    assert stats.is_empty()
    assert len(taken["loads"]) == 1
    assert AwarenessConnector.build_kv_connector_stats().is_empty()


# On vLLM's /metrics, and in its log


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def transfer() -> KVTransferConfig:
    return KVTransferConfig(**transfer_config(ServingConfig(store="store")))


@pytest.fixture
def shown(registry: CollectorRegistry, transfer: KVTransferConfig) -> KVConnectorProm:
    """Our metrics as vLLM makes them for a server of two engines, in a registry of the test's."""

    class Prom(KVConnectorProm):
        _gauge_cls = functools.partial(Gauge, registry=registry)  # type: ignore[assignment]
        _counter_cls = functools.partial(Counter, registry=registry)  # type: ignore[assignment]
        _histogram_cls = functools.partial(Histogram, registry=registry)  # type: ignore[assignment]

    config: Any = SimpleNamespace(kv_transfer_config=transfer)
    return Prom(config, LABELS, {0: ["m", "0"], 1: ["m", "1"]})


def value(registry: CollectorRegistry, name: str, label: str, engine: int = 0) -> float | None:
    """A sample of ours; its own label is the reason or the temperature."""
    own = "reason" if "failures" in name else "temperature"
    labels = {"model_name": "m", "engine": str(engine), own: label}
    return registry.get_sample_value(f"vllm:awareness_{name}", labels)


def test_outcomes_are_on_the_metrics(registry: CollectorRegistry, shown: KVConnectorProm) -> None:
    stats = stats_of(COLD, WARM, WARM, Failed("OSError"), requests=("warm", "warm", RECOMPUTED))
    shown.observe(stats.to_dict(), 1)
    shown.observe(stats_of(WARM, Failed("OSError"), Failed("KeyError")).to_dict(), 1)
    sample = functools.partial(value, registry, engine=1)
    assert [sample("loads_total", t) for t in TEMPERATURES] == [0, 3, 1]
    assert [sample("tokens_total", t) for t in TEMPERATURES] == [0, 2400, 800]
    assert [sample("bytes_total", t) for t in TEMPERATURES] == [0, 9 * 2**20, 3 * 2**20]
    assert [sample("load_seconds_count", t) for t in TEMPERATURES] == [0, 3, 1]
    assert sample("load_seconds_sum", "warm") == pytest.approx(0.06)
    assert sample("requests_total", "warm") == 2
    assert sample("requests_total", RECOMPUTED) == 1
    assert sample("failures_total", "OSError") == 2
    assert sample("failures_total", "KeyError") == 1
    assert [value(registry, "loads_total", t) for t in TEMPERATURES] == [0, 0, 0]
    assert value(registry, "failures_total", "OSError") is None


@pytest.mark.parametrize("engine", [0, 1])
def test_series_start_at_zero(
    registry: CollectorRegistry, shown: KVConnectorProm, engine: int
) -> None:
    for name in ("loads_total", "tokens_total", "bytes_total", "load_seconds_count"):
        assert [value(registry, name, t, engine) for t in TEMPERATURES] == [0, 0, 0], name
    for temperature in (*TEMPERATURES, RECOMPUTED):
        assert value(registry, "requests_total", temperature, engine) == 0


def test_the_histogram_tells_milliseconds_from_seconds(
    registry: CollectorRegistry, shown: KVConnectorProm
) -> None:
    shown.observe(stats_of(Loaded("cold", 1, 1, 0.004), Loaded("cold", 1, 1, 4.0)).to_dict())
    labels = {"model_name": "m", "engine": "0", "temperature": "cold"}
    buckets = {
        le: registry.get_sample_value("vllm:awareness_load_seconds_bucket", labels | {"le": le})
        for le in ("0.0025", "0.005", "2.5", "5.0", "+Inf")
    }
    assert list(buckets.values()) == [0, 1, 1, 2, 2]


def test_vllms_log_line_sums_the_steps_and_leaves_them_as_they_are(
    transfer: KVTransferConfig,
) -> None:
    log, lines = KVConnectorLogging(transfer), []
    steps = [stats_of(COLD).to_dict(), stats_of(WARM, Failed("OSError")).to_dict()]
    for step in steps:
        log.observe(step)
    assert [len(step["loads"]) for step in steps] == [1, 1]
    log.log(lambda text, *values: lines.append(text % values))
    log.log(lambda text, *values: lines.append(text % values))
    assert len(lines) == 1
    assert "Memory loads=2" in lines[0]
    assert "Failed loads=1" in lines[0]


# Several workers


@given(one=loads, other=loads)
def test_two_ranks_share_one_load(one: Loaded, other: Loaded) -> None:
    merged = merge_ranks(one, other)
    assert isinstance(merged, Loaded)
    assert merged == merge_ranks(other, one)
    assert merged.bytes == one.bytes + other.bytes
    assert (merged.tokens, merged.seconds) == (
        max(one.tokens, other.tokens),
        max(one.seconds, other.seconds),
    )
    coldest = max(TEMPERATURES.index(load.temperature) for load in (one, other))
    assert merged.temperature == TEMPERATURES[coldest]


def test_a_load_that_failed_on_one_rank_failed() -> None:
    failed = Failed("OSError")
    assert merge_ranks(failed, COLD) == merge_ranks(COLD, failed) == failed


def test_vllm_aggregates_the_outcomes_of_its_workers() -> None:
    def output_with(**by_request: Outcome) -> ModelRunnerOutput:
        meta = StepOutcomes(dict(by_request)) if by_request else None
        output = KVConnectorOutput(kv_connector_worker_meta=meta)
        return ModelRunnerOutput([], {}, kv_connector_output=output)

    failed = Failed("OSError")
    workers = [output_with(), output_with(a=COLD, b=WARM), output_with(a=COLD, b=failed, c=HOT)]
    output = KVOutputAggregator(expected_finished_count=3).aggregate(list(workers))
    assert output is not None
    assert output.kv_connector_output is not None
    merged = output.kv_connector_output.kv_connector_worker_meta
    both = Loaded("cold", COLD.tokens, 2 * COLD.bytes, COLD.seconds)
    assert merged == StepOutcomes({"a": both, "b": failed, "c": HOT})


def test_ranks_that_end_in_different_steps_share_one_load() -> None:
    tracker = LoadTracker()
    tracker.start("r")
    tracker.record({"r": WARM}, [])
    assert tracker.take_stats() is None
    tracker.record({"r": COLD}, ["r"])
    both = Loaded("cold", COLD.tokens, WARM.bytes + COLD.bytes, COLD.seconds)
    assert tracker.outcomes == {"r": both}
    assert tracker.take_stats() == stats_of(both)
    assert tracker.by_rank == {}


# The dashboard


def expressions(node: Any) -> list[str]:
    """Every PromQL expression of a dashboard, those of its variables too."""
    if isinstance(node, list):
        return [expression for item in node for expression in expressions(item)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("expr", "definition") if key in node]
    return own + [expression for item in node.values() for expression in expressions(item)]


def test_the_dashboard_shows_exactly_the_metrics(
    registry: CollectorRegistry, shown: KVConnectorProm
) -> None:
    shown.observe(stats_of(COLD, Failed("OSError"), requests=("cold",)).to_dict())
    with pytest.raises(OSError, match="disk"), PullMetrics(registry).pull(1):
        raise OSError("disk")
    families = [family for family in registry.collect() if family.name.startswith("vllm:")]
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    queries = expressions(json.loads(DASHBOARD.read_text()))
    assert queries
    for expression in queries:
        (name,) = re.findall(r"vllm:\w+", expression)
        assert name in labels, expression
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        filtered = re.findall(r"(\w+)=~", expression)
        used = {label.strip() for group in grouped for label in group.split(",")} | {*filtered}
        assert used <= labels[name], expression
    for family in families:
        assert any(family.name in expression for expression in queries), family.name


def test_the_dashboard_can_be_imported() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board["schemaVersion"] >= 39
    variables = {variable["name"]: variable["type"] for variable in board["templating"]["list"]}
    assert variables["datasource"] == "datasource"
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        assert panel["datasource"] == source, panel["title"]
        assert all(target["datasource"] == source for target in panel["targets"])
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) >= 6
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]}
    assert len(places) == len(ids)
