"""Ways from one model to another over the W-Matrices at hand, by what their certificates say."""

from __future__ import annotations

import heapq
import itertools
import math

from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import with_tail
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry

Hops = tuple[WMatrixEntry, ...]
SMALLEST = 1e-9
"""A retention of nothing, or less, has no logarithm."""


def key(model: Geometry) -> object:
    """What tells models apart, as `Geometry.same_model` does."""
    return model.weights, model.tokenizer, model.layers


def names(hops: Hops) -> tuple[str, ...]:
    """The models on the way."""
    return (hops[0].manifest.source.name, *(hop.manifest.target.name for hop in hops))


def kept(entry: WMatrixEntry, context: int | None) -> float | None:
    """What a map alone is certified to keep of so many tokens, by default of its protocol's."""
    if (found := entry.certificate) is None:
        return None
    return with_tail(found, context or found.protocol.context, 0).retention.mean


def expected(hops: Hops, context: int | None) -> float | None:
    """What a way keeps: a hop's certificate, or the product of several; None where one has none."""
    found = [kept(hop, context) for hop in hops]
    if any(k is None for k in found):
        return None
    if len(found) == 1:
        return found[0]
    return math.prod(min(max(k, 0.0), 1.0) for k in found if k is not None)


def best(
    registry: Registry,
    start: Geometry,
    end: Geometry,
    context: int | None,
    *,
    direct: bool,
) -> Hops | None:
    """The way with the fewest uncertified hops, of these the one that keeps most (Dijkstra on
    −log retention), of these the shortest; with `direct` in one hop, otherwise in several."""
    edges: dict[object, list[WMatrixEntry]] = {}
    for entry in registry:
        source, target = key(entry.manifest.source), key(entry.manifest.target)
        if ((source, target) == (key(start), key(end))) == direct:
            edges.setdefault(source, []).append(entry)
    ties = itertools.count()
    heap: list[tuple[int, float, int, int, Hops]] = [(0, 0.0, 0, next(ties), ())]
    settled: set[object] = set()
    while heap:
        unknown, cost, length, _, way = heapq.heappop(heap)
        at = key(way[-1].manifest.target if way else start)
        if at in settled:
            continue
        settled.add(at)
        if at == key(end):
            return way
        for entry in edges.get(at, ()):
            k = kept(entry, context)
            more = 0.0 if k is None else -math.log(min(max(k, SMALLEST), 1.0))
            step = (unknown + (k is None), cost + more, length + 1, next(ties), (*way, entry))
            heapq.heappush(heap, step)
    return None


def note(usable: Registry, start: Geometry, end: Geometry, way: Hops, direct: Hops | None) -> str:
    """How the direct map fared against the way that was found."""
    if way is direct:
        return "the direct map: no other way is expected to keep more"
    if direct:
        return "expected to keep more than the direct map"
    if best(usable, start, end, None, direct=True):
        return "a direct map exists, and nobody has measured it"
    return "there is no direct map"
