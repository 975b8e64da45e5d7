"""A server's trust: whose signatures count, and the W-Matrices that may be used."""

from __future__ import annotations

from pathlib import Path

from awareness_vllm.errors import BadInput
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.registry import Registry


def trust_of(config: ServingConfig) -> TrustPolicy:
    """The trust policy. Raises BadInput."""
    if config.signed != "none" and not config.trust:
        raise BadInput(
            "nothing can be required to be signed without a trust file",
            found=f"require_signed={config.signed}",
            expected="a trust file",
            remedy="give --trust FILE, or leave --require-signed out",
        )
    return TrustPolicy.read(Path(config.trust) if config.trust else None)


def trusted_maps(config: ServingConfig, trust: TrustPolicy) -> Registry:
    """The W-Matrices.

    Raises:
        WMatrixCorrupt: one that cannot be used.
        SignatureInvalid: one that is not signed and must be, or whose signature is not its own.
    """
    registry = Registry.read(config.wmatrices, trust)
    if config.signed != "none":
        for entry in registry:
            trust.require(entry.path, entry.digest, "wmatrix")
    return registry
