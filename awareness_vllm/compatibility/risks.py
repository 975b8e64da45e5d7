"""What may make a memory worth less than the estimate says, or unusable: registered functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from awareness_vllm.compatibility.context import CheckContext
from awareness_vllm.compatibility.load_time.cost import target_memory_gb
from awareness_vllm.compatibility.report import Impact, RiskFactor
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import TIERS

Risk = Callable[[CheckContext], Iterator[tuple[Impact, str]]]
RISKS: list[Risk] = []

FEW_TEXTS = 32
"""Documents fewer than this can differ from others by 0.08 in the mean (docs/fidelity-log.md)."""


def risk(function: Risk) -> Risk:
    """Register a function that gives impacts and descriptions."""
    RISKS.append(function)
    return function


def risks(check: CheckContext) -> tuple[RiskFactor, ...]:
    """All risks of a case, the worst first."""
    found = [RiskFactor(impact=i, description=says) for one in RISKS for i, says in one(check)]
    if check.target.geometry is not None:
        found += findings(check.config, check.target.geometry, check.tokens)
    return tuple(sorted(found, key=lambda r: ("high", "medium", "low").index(r.impact)))


@risk
def refused(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """A memory that a server does not load."""
    if check.refusal is not None:
        yield "high", f"it cannot be loaded: {check.refusal.what}"


@risk
def unmeasured(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    if check.entry is not None and check.certificate is None:
        yield "high", "the W-Matrix has no certificate: nobody has measured what it keeps"


@risk
def beyond_measured(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """Lengths and kinds of text that the certificate has not seen."""
    if check.certificate is None:
        return
    longest = max(plan.context for plan in check.certificate.plans)
    if check.tokens > longest:
        impact: Impact = "high" if check.tokens > 2 * longest else "medium"
        yield impact, f"{check.tokens} tokens, and nobody has measured more than {longest}"
    if (count := check.certificate.counts["texts"]) < FEW_TEXTS:
        yield "medium", f"the certificate is from {count} texts: others may differ"
    kinds = {kind for plan in check.certificate.plans for kind in plan.kinds}
    if check.kind is None or check.kind not in kinds:
        yield "low", f"measured on {', '.join(sorted(kinds))}, not on text like this"


@risk
def lost_facts(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    """Facts that retention alone hides the loss of."""
    if check.certificate is None:
        return
    kept = check.certificate.facts.mean
    if kept < TIERS[0][1]:
        impact: Impact = "high" if kept < TIERS[1][1] else "medium"
        yield impact, f"names, places and codes: only {kept:.2f} of those recalled natively"


@risk
def published_only(check: CheckContext) -> Iterator[tuple[Impact, str]]:
    if check.subject.source.geometry is None or check.target.geometry is None:
        yield "high", "known by published figures alone: nobody here measured them, or can load it"


FEW_BITS = ("int4", "awq", "gptq")
EIGHT_BITS = ("fp8", "int8")


def findings(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """The risks of serving a memory of so many tokens (the target's) in this way."""
    return (*room(config, geometry, tokens), *other_weights(config), *other_cache(config))


def room(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """Whether the devices have room for the memory, and anything of it is loaded."""
    found = []
    each = target_memory_gb(geometry, tokens, config) / config.num_gpus
    if config.memory_gb is not None and each > config.memory_gb:
        says = f"the memory takes {each:.3g} GB of each device, which has {config.memory_gb:g} GB"
        found.append(RiskFactor(description=says, impact="high"))
    if tokens <= config.tail:
        says = (
            f"the target reads all {tokens} tokens itself (tail {config.tail}): nothing is loaded"
        )
        found.append(RiskFactor(description=says, impact="low"))
    return tuple(found)


def other_weights(config: TargetConfig) -> tuple[RiskFactor, ...]:
    """Weights for which no certificate speaks: a W-Matrix is fitted and measured on exact ones."""
    found = []
    if config.custom_fine_tune is not None:
        says = f"{config.custom_fine_tune} has other weights than a W-Matrix of the target was "
        found.append(RiskFactor(description=says + "fitted to; fit one for it", impact="high"))
    if config.quantization in (*FEW_BITS, *EIGHT_BITS):
        impact = "medium" if config.quantization in EIGHT_BITS else "high"
        says = f"{config.quantization} weights are not those that a W-Matrix was measured on"
        found.append(RiskFactor(description=says, impact=impact))
    return tuple(found)


def other_cache(config: TargetConfig) -> tuple[RiskFactor, ...]:
    """States that are rounded on their way in."""
    if not config.kv_cache_dtype.startswith("fp8"):
        return ()
    says = (
        f"a {config.kv_cache_dtype} cache rounds the memory's states; nobody measured what is lost"
    )
    return (RiskFactor(description=says, impact="low"),)
