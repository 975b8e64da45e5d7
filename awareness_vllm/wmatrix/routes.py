"""Routes from one model to another over W-Matrices, by what their certificates say."""

from __future__ import annotations

import heapq
import itertools
import math

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.plans import with_tail
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

Route = tuple[WMatrixEntry, ...]
"""W-Matrices one after another: each leads from the model to which the one before it leads."""
SMALLEST = 1e-9
"""The least retention of a map on a route: zero and less have no logarithm."""


def key(model: Geometry) -> object:
    """The identity of a model, as in `Geometry.same_model`."""
    return model.weights, model.tokenizer, model.layers


def names(route: Route) -> tuple[str, ...]:
    """The models along a route."""
    return (route[0].manifest.source.name, *(entry.manifest.target.name for entry in route))


def certified_retention(entry: WMatrixEntry, context: int | None) -> float | None:
    """The certified retention of a map alone, without a native tail, for a memory of `context`
    tokens (by default the protocol's); None without a certificate."""
    if (certificate := entry.certificate) is None:
        return None
    return with_tail(certificate, context or certificate.protocol.context, 0).retention.mean


def expected_retention(route: Route, context: int | None) -> float | None:
    """The certified retention of one map, or the product over several; None where one of them has
    no certificate."""
    factors = [certified_retention(entry, context) for entry in route]
    if any(factor is None for factor in factors):
        return None
    if len(factors) == 1:
        return factors[0]
    return math.prod(min(max(factor, 0.0), 1.0) for factor in factors if factor is not None)


def best_route(
    registry: Registry,
    start: Geometry,
    end: Geometry,
    context: int | None,
    *,
    direct: bool,
) -> Route | None:
    """The route with the fewest uncertified maps, among those the one of highest expected retention
    (Dijkstra on −log retention), among those the shortest; None where no route leads there.

    Args:
        direct: of one map; otherwise of several.
    """
    edges: dict[object, list[WMatrixEntry]] = {}
    for entry in registry:
        source, target = key(entry.manifest.source), key(entry.manifest.target)
        if ((source, target) == (key(start), key(end))) == direct:
            edges.setdefault(source, []).append(entry)
    ties = itertools.count()
    heap: list[tuple[int, float, int, int, Route]] = [(0, 0.0, 0, next(ties), ())]
    settled: set[object] = set()
    while heap:
        uncertified, cost, length, _, route = heapq.heappop(heap)
        at = key(route[-1].manifest.target if route else start)
        if at in settled:
            continue
        settled.add(at)
        if at == key(end):
            return route
        for entry in edges.get(at, ()):
            retention = certified_retention(entry, context)
            more = 0.0 if retention is None else -math.log(min(max(retention, SMALLEST), 1.0))
            unknown = uncertified + (retention is None)
            step = (unknown, cost + more, length + 1, next(ties), (*route, entry))
            heapq.heappush(heap, step)
    return None


def note(
    usable: Registry, start: Geometry, end: Geometry, route: Route, direct: Route | None
) -> str:
    """A sentence that compares the route with the direct map."""
    if route is direct:
        return "the direct map: no other route is expected to keep more"
    if direct:
        return "expected to keep more than the direct map"
    if best_route(usable, start, end, None, direct=True):
        return "there is a direct map, but it was never measured"
    return "there is no direct map"
