"""Ways to raise a memory's retention, with their gains: measured ones before estimated ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.estimate import predict
from awareness_vllm.compatibility.report import Action
from awareness_vllm.wmatrix.plans import plans_for
from awareness_vllm.wmatrix.routes import best_route, expected_retention, names


def advice(check: CheckContext, retention: float | None) -> tuple[Action, ...]:
    """Actions that would keep more, the greatest gain first, those of unknown gain last."""
    if check.exact:
        return ()
    # No map but the one that made it moves a latent.
    other_maps = () if check.memory.latent else (other_route, better_map)
    actions = [
        *first_steps(check),
        *longer_tails(check),
        *(action for kind in (recompute, *other_maps) for action in kind(check, retention)),
        *precision(check),
    ]
    return tuple(sorted(actions, key=lambda a: (a.gain is None, -(a.gain or 0.0))))


def first_steps(check: CheckContext) -> Iterator[Action]:
    """A map where there is none, a certificate where the map has none."""
    if check.entry is None and (latent := check.memory.latent):
        text = f"use the package that the latent was made of, {latent.package}; or give the map "
        text += f"that made it, whose tensors have the digest {latent.wmatrix[:12]}…"
        yield Action(description=text, gain=None, basis="estimated")
    elif check.entry is None:
        text = f"fit a W-Matrix from {check.memory.source.name} to {check.target.name} "
        text += "(`awareness fit`)" if check.verdict else "if the weights of both can be had"
        yield Action(description=text, gain=None, basis="estimated")
    elif check.certificate is None:
        text = f"measure the map (`awareness certify {check.entry.path.name}`)"
        yield Action(description=text, gain=None, basis="estimated")


def basis_of_gain(check: CheckContext) -> Literal["measured", "estimated"]:
    """The basis of a gain over the memory's retention: that of the retention."""
    return "measured" if check.measured else "estimated"


def longer_tails(check: CheckContext) -> Iterator[Action]:
    """More of the memory's last tokens read by the target itself."""
    if check.certificate is None:
        return
    reread = check.config.reread
    served = predict(check.certificate, check.tokens, check.config.tail, check.kind, reread=reread)
    plans = plans_for(check.certificate, check.tokens)
    most = max(plan.reread for plan in plans if plan.reread <= reread)
    for plan in (plan for plan in plans if plan.reread == most and not plan.beaten):
        more = predict(check.certificate, check.tokens, plan.tail, check.kind, reread=reread)
        gain = more.mean - served.mean
        if check.config.tail < plan.tail < check.tokens and gain > 0:
            text = f"read the last {plan.tail} tokens natively (`--tail {plan.tail}`)"
            text += f", at {plan.cost:.0%} of the prefill's operations"
            yield Action(description=text, gain=gain, basis=basis_of_gain(check))


def recompute(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """Everything read by the target: always possible."""
    if retention is not None and check.entry is not None and retention < 1:
        text = "let the target read the text itself (`on_low_quality: recompute`), at all its cost"
        yield Action(description=text, gain=1 - retention, basis=basis_of_gain(check))


def other_route(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """A route through other models, by its certificates."""
    source, target = check.memory.source.geometry, check.target.geometry
    if source is None or target is None:
        return
    route = best_route(check.registry.certified(), source, target, check.tokens, direct=False)
    expected = expected_retention(route, check.tokens) if route else None
    if route is None or expected is None or (retention is not None and expected <= retention):
        return
    gain = None if retention is None else expected - retention
    text = f"go {' → '.join(names(route))} (`awareness path`)"
    yield Action(description=text, gain=gain, basis="estimated")


def better_map(check: CheckContext, retention: float | None) -> Iterator[Action]:
    """A map of higher rank, or a calibrated one."""
    if check.entry is None or retention is None:
        return
    # The loss by rank of a map without calibration does not predict it (docs/fidelity-log.md).
    text = f"fit with a higher rank than {check.entry.manifest.rank} (`awareness fit --rank`)"
    yield Action(description=text, gain=None, basis="estimated")
    if not check.entry.manifest.fit.get("calibration"):
        text = "calibrate the map through the target (`awareness fit --calibration`)"
        yield Action(description=text, gain=None, basis="estimated")


def precision(check: CheckContext) -> Iterator[Action]:
    """A cache that does not round."""
    if check.config.rounds:
        text = "keep the cache in the model's own dtype (`--kv-cache-dtype auto`)"
        yield Action(description=text, gain=None, basis="estimated")
