"""`MemoryCompatibilityChecker`: the report of a memory on a target, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awareness_vllm.compatibility.appraisal import report
from awareness_vllm.compatibility.context import CheckContext, MemoryListing, memory_info
from awareness_vllm.compatibility.models import model
from awareness_vllm.compatibility.report import CompatibilityReport
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import BadInput
from awareness_vllm.marketplace.maps import with_repository
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.registry import Registry

if TYPE_CHECKING:
    from awareness_vllm.packages.file import Package


class MemoryCompatibilityChecker:
    """Checks memories against targets.

        report = MemoryCompatibilityChecker().check(
            memory_listing=listing,
            target_model="llama-3.1-70b",
            target_config={"quantization": "fp16", "context_length": 128000, "num_gpus": 4},
        )
        print(f"{report.compatibility_score:.1%} {report.estimated_retention:.1%}")
        print(f"{report.head_mapping_quality:.3f} {report.positional_compatibility:.3f}")
        print(f"{report.target_memory_gb:.1f} GB {report.estimated_load_time_s:.0f} s")
        for risk in report.risk_factors:
            print(risk.description, risk.impact)

    Args:
        wmatrices: a registry, or files and folders, by default `$AWARENESS_HOME/wmatrices`.
        store: folder in which IDs of memories are looked up.
        trust: a trust file; without one nobody's signature counts.
        registry: where maps are looked for that are not among `wmatrices`: `oci://HOST/REPOSITORY`
            or a layout folder. Of them the listings alone are read. By default the one of
            `Marketplace()`, unless `wmatrices` are given.

    Raises:
        BadInput: a trust file or a registry that cannot be used.
    """

    def __init__(
        self,
        wmatrices: Registry | Sequence[str | Path] | None = None,
        *,
        store: Path | None = None,
        trust: Path | None = None,
        registry: str | Path | None = None,
    ) -> None:
        self.trust = TrustPolicy.read(trust)
        self.registry = with_repository(wmatrices, registry, self.trust)
        self.store = store

    def check(
        self,
        memory_listing: MemoryListing | Package | str | Path | None = None,
        target_model: str | Path | None = None,
        target_config: Mapping[str, Any] | TargetConfig | None = None,
        *,
        package: Package | str | Path | None = None,
        kind: str | None = None,
        measure: bool = False,
    ) -> CompatibilityReport:
        """The report of a memory on a target.

        Args:
            memory_listing: a listing of `Marketplace`, or anything with `source_model` and
                `token_count`; or, as with `package`, a package, its file or its ID in the store.
            target_model: a folder, a model's name in the W-Matrices, or a published one.
            target_config: fields of `TargetConfig`.
            kind: the kind of its text, as the certificate (or a published table) names kinds.
            measure: measure the package on its own last quarter; the target must be a folder.

        Raises:
            BadInput: an unknown name, or a configuration that contradicts itself.
            InvalidMemoryId, MemoryNotFound, PackageCorrupt, SignatureInvalid: no such memory, or a
                damaged one.
            UnsupportedModel: the folder of a model that cannot be used.
            RegistryError: the registry cannot be asked for a map.
        """
        if (memory_listing is None) == (package is None) or target_model is None:
            raise BadInput(
                "a check is of one memory and one target",
                found=f"memory_listing={memory_listing!r}, package={package!r}, "
                f"target_model={target_model!r}"[:200],
                expected="target_model, and either memory_listing or package",
            )
        memory = package if memory_listing is None else memory_listing
        assert memory is not None
        info = memory_info(memory, self.store, self.registry, self.trust)
        check = CheckContext(
            memory=info,
            target=model(target_model, self.registry),
            config=TargetConfig.read(target_config),
            registry=self.registry,
            tokens=info.tokens,
            kind=kind,
        )
        if check.target.geometry is not None:
            check.config.check(check.target.geometry)
        if measure:
            # Late: it loads models, and nothing else of a check needs torch.
            from awareness_vllm.compatibility.self_test import with_self_test

            check = with_self_test(check, memory, target_model)
        return report(check)
