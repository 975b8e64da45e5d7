"""What would raise a memory's retention, and by how much: measured gains before estimated ones."""

from __future__ import annotations

from collections.abc import Iterator

from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.compatibility.report import Action
from awareness_vllm.wmatrix.certificate import plans_for
from awareness_vllm.wmatrix.routes import best, expected, names


def advice(check: CheckContext, retention: float | None) -> tuple[Action, ...]:
    """Actions that would keep more, the greatest gain first, those of unknown gain last."""
    if check.exact:
        return ()
    found = [
        *ways(check),
        *longer_tails(check),
        *recompute(check, retention),
        *hops(check, retention),
        *better_map(check, retention),
        *precision(check),
    ]
    return tuple(sorted(found, key=lambda a: (a.gain is None, -(a.gain or 0.0))))


def ways(check: CheckContext) -> Iterator[Action]:
    """What is to be done first where nothing was measured."""
    if check.entry is None:
        says = f"fit a W-Matrix from {check.subject.source.name} to {check.target.name}"
        yield Action(description=f"{says} (`awareness fit`)", gain=None, basis="estimated")
    elif check.certificate is None:
        says = f"measure the map (`awareness certify {check.entry.path.name}`)"
        yield Action(description=says, gain=None, basis="estimated")


def longer_tails(check: CheckContext) -> Iterator[Action]:
    """More of the memory's end read by the target itself."""
    if check.certificate is None:
        return
    now = predict(check.certificate, check.tokens, check.config.tail, check.kind).mean
    for plan in plans_for(check.certificate, check.tokens):
        gain = predict(check.certificate, check.tokens, plan.tail, check.kind).mean - now
        if check.config.tail < plan.tail < check.tokens and gain > 0:
            says = f"read the last {plan.tail} tokens natively (`--tail {plan.tail}`)"
            says += f", at {plan.cost:.0%} of the prefill's operations"
            yield Action(description=says, gain=gain, basis="measured")


def recompute(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """Everything read by the target: the floor that is always there."""
    if retention is not None and check.entry is not None and retention < 1:
        says = "let the target read the text itself (`on_low_quality: recompute`), at all its cost"
        yield Action(description=says, gain=1 - retention, basis="measured")


def hops(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """A way through other models, by its certificates."""
    source, target = check.subject.source.geometry, check.target.geometry
    if source is None or target is None:
        return
    way = best(check.registry.certified(), source, target, check.tokens, direct=False)
    kept = expected(way, check.tokens) if way else None
    if way is None or kept is None or (retention is not None and kept <= retention):
        return
    says = f"go {' → '.join(names(way))} (`awareness path`)"
    yield Action(
        description=says, gain=None if retention is None else kept - retention, basis="estimated"
    )


def better_map(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """A map of more rank, or a calibrated one."""
    if check.entry is None or retention is None:
        return
    # What is lost to a rank without calibration says nothing of it (docs/fidelity-log.md).
    says = f"fit with a higher rank than {check.entry.manifest.rank} (`awareness fit --rank`)"
    yield Action(description=says, gain=None, basis="estimated")
    if not check.entry.manifest.fit.get("calibration"):
        says = "calibrate the map through the target (`awareness fit --calibration`)"
        yield Action(description=says, gain=None, basis="estimated")


def precision(check: CheckContext) -> Iterator[Action]:
    """A cache that does not round."""
    if check.config.kv_cache_dtype.startswith("fp8"):
        says = "keep the cache in the model's own dtype (`--kv-cache-dtype auto`)"
        yield Action(description=says, gain=None, basis="estimated")
