"""Risk factors of a memory on a target: registered functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.load_time.cost import target_memory_gb
from awareness_vllm.compatibility.report import Impact, RiskFactor
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import TIERS
from awareness_vllm.wmatrix.plans import longest_context, with_tail

Risk = Callable[[CheckContext], Iterator[tuple[Impact, str]]]
RISKS: list[Risk] = []

FEW_TEXTS = 32
"""Documents fewer than this can differ from others by 0.08 in the mean (docs/fidelity-log.md)."""


def risk(function: Risk) -> Risk:
    """Register a function that yields impacts and descriptions."""
    RISKS.append(function)
    return function


def risks(check: CheckContext) -> tuple[RiskFactor, ...]:
    """All risks of a memory on a target, the highest impact first."""
    factors = [RiskFactor(impact=i, description=text) for one in RISKS for i, text in one(check)]
    if check.target.geometry is not None:
        factors += serving_risks(check.config, check.target.geometry, check.tokens)
    return tuple(sorted(factors, key=lambda r: ("high", "medium", "low").index(r.impact)))


@risk
def refused(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """A memory that a server refuses."""
    if check.refusal is not None:
        yield "high", f"it cannot be loaded: {check.refusal.what}"


@risk
def unmeasured(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    if check.entry is not None and check.certificate is None:
        yield "high", "the W-Matrix has no certificate: its retention was never measured"


@risk
def claimed(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """A certificate that no trusted key signed."""
    if check.claimed:
        yield "high", "nobody whom you trust signed the W-Matrix's certificate: figures are claimed"


@risk
def beyond_measured(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """Lengths and kinds of text that the certificate does not cover."""
    if check.certificate is None:
        return
    longest = longest_context(check.certificate)
    if check.tokens > longest:
        impact: Impact = "high" if check.tokens > 2 * longest else "medium"
        text = f"{check.tokens} tokens: the longest measured memories have {longest}"
        yield impact, f"{text}, and the figures go on by the trend of shorter ones"
    if (count := check.certificate.counts["texts"]) < FEW_TEXTS:
        yield "medium", f"the certificate is from {count} texts: others may differ"
    kinds = {kind for plan in check.certificate.plans for kind in plan.kinds}
    if check.kind is None or check.kind not in kinds:
        yield "low", f"measured on {', '.join(sorted(kinds))}, not on text like this"


@risk
def not_worth_it(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """What the same cost buys without a memory."""
    if check.certificate is None or check.exact:
        return
    config = check.config
    plan = with_tail(check.certificate, check.tokens, config.tail, config.reread)
    if plan.margin is None:
        yield "medium", "what the same cost buys without a memory was not measured"
    elif plan.beaten:
        best = max(plan.controls, key=lambda name: plan.controls[name].mean)
        kept = f"keeps as much or more ({plan.controls[best].mean:.3f})"
        yield "high", f"reading a part of the text for the same cost ({best}) {kept}"


@risk
def lost_facts(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """Lost facts, which retention alone hides."""
    if check.certificate is None:
        return
    config = check.config
    plan = with_tail(check.certificate, check.tokens, config.tail, config.reread)
    recall = (plan.facts or check.certificate.facts).mean
    if recall < TIERS[0][1]:
        impact: Impact = "high" if recall < TIERS[1][1] else "medium"
        yield impact, f"names, places and codes: only {recall:.2f} of those recalled natively"


@risk
def rounded(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """A latent in int8."""
    if check.memory.manifest is not None and check.memory.manifest.rounded:
        yield "low", "its latent is rounded to int8, which the certificate's figures are not"


@risk
def published_only(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    if check.memory.source.geometry is None or check.target.geometry is None:
        yield "high", "published figures alone: not measured here, and the memory cannot be loaded"


FEW_BITS = ("int4", "awq", "gptq")
EIGHT_BITS = ("fp8", "int8")


def serving_risks(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """The risks of these settings for a memory of `tokens` of the target's tokens."""
    return (*room(config, geometry, tokens), *other_weights(config), *other_cache(config))


def room(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """A memory that is too large for the devices, or so short that nothing of it is loaded."""
    factors = []
    each = target_memory_gb(geometry, tokens, config) / config.num_gpus
    if config.memory_gb is not None and each > config.memory_gb:
        text = f"the memory takes {each:.3g} GB of each device, which has {config.memory_gb:g} GB"
        factors.append(RiskFactor(description=text, impact="high"))
    if tokens <= config.tail:
        text = (
            f"the target reads all {tokens} tokens itself (tail {config.tail}): nothing is loaded"
        )
        factors.append(RiskFactor(description=text, impact="low"))
    return tuple(factors)


def other_weights(config: TargetConfig) -> tuple[RiskFactor, ...]:
    """Weights without a certificate: a W-Matrix is fitted and measured on exact ones."""
    factors = []
    if config.custom_fine_tune is not None:
        text = f"{config.custom_fine_tune} has other weights than a W-Matrix of the target was "
        factors.append(RiskFactor(description=text + "fitted to; fit one for it", impact="high"))
    if config.quantization in (*FEW_BITS, *EIGHT_BITS):
        impact = "medium" if config.quantization in EIGHT_BITS else "high"
        text = f"{config.quantization} weights are not those that a W-Matrix was measured on"
        factors.append(RiskFactor(description=text, impact=impact))
    return tuple(factors)


def other_cache(config: TargetConfig) -> tuple[RiskFactor, ...]:
    """A cache that rounds the states."""
    if not config.rounds:
        return ()
    text = f"a {config.kv_cache_dtype} cache rounds the memory's states: a loss never measured here"
    return (RiskFactor(description=text, impact="low"),)
