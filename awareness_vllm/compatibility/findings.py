"""What a target's configuration means for a memory: risks, where it does not forbid anything."""

from __future__ import annotations

from awareness_vllm.compatibility.cost import target_memory_gb
from awareness_vllm.compatibility.report import UNUSABLE, RiskFactor
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.geometry import Geometry

FEW_BITS = ("int4", "awq", "gptq")
EIGHT_BITS = ("fp8", "int8")


def findings(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """The risks of serving a memory of so many tokens (the target's) in this way."""
    return (*room(config, geometry, tokens), *other_weights(config), *other_cache(config))


def room(config: TargetConfig, geometry: Geometry, tokens: int) -> tuple[RiskFactor, ...]:
    """Whether context window and devices have room for the memory."""
    found = []
    longest = config.context_length or geometry.max_positions
    if tokens >= longest:
        says = f"the memory's {tokens} tokens do not fit a context window of {longest}"
        found.append(RiskFactor(description=f"{says}: {UNUSABLE}", impact="high"))
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
