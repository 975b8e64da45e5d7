"""`MemoryCompatibilityChecker`: what a memory would be on a target, before anything is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from awareness_vllm.compatibility.appraisal import report
from awareness_vllm.compatibility.case import Case, Listing, Subject, subject
from awareness_vllm.compatibility.ends import model
from awareness_vllm.compatibility.on_the_spot import measure as measure_on_itself
from awareness_vllm.compatibility.report import CompatibilityReport
from awareness_vllm.compatibility.target import TargetConfig
from awareness_vllm.errors import BadInput, PackageCorrupt
from awareness_vllm.geometry import resolve_folder
from awareness_vllm.packages.file import Package, read, verify
from awareness_vllm.packages.manifest import read_manifest
from awareness_vllm.wmatrix.file import load
from awareness_vllm.wmatrix.shelf import entries


class MemoryCompatibilityChecker:
    """Checks memories against targets.

    Args:
        wmatrices: files or folders of them, by default `$AWARENESS_HOME/wmatrices`.
        store: folder in which IDs of memories are looked up.
    """

    def __init__(
        self, wmatrices: Sequence[str | Path] | None = None, *, store: Path | None = None
    ) -> None:
        self.shelf = entries(wmatrices)
        self.store = store

    def check(
        self,
        memory_listing: Listing | Package | str | Path | None = None,
        target_model: str | Path | None = None,
        target_config: Mapping[str, Any] | TargetConfig | None = None,
        *,
        package: Package | str | Path | None = None,
        kind: str | None = None,
        measure: bool = False,
    ) -> CompatibilityReport:
        """What a memory would be on a target.

        Args:
            memory_listing: what is offered: anything with `source_model` and `token_count`; or, as
                with `package`, a package, its file or its ID in the store.
            target_model: a folder, a name that the W-Matrices know, or a published one.
            target_config: fields of `TargetConfig`.
            kind: the kind of its text, as the certificate (or a published table) names kinds.
            measure: measure the package on its own last part; the target must be a folder.

        Raises:
            BadInput: a name that nobody knows, a configuration that contradicts itself;
            InvalidMemoryId, MemoryNotFound, PackageCorrupt: no such memory, or a damaged one;
            UnsupportedModel: the folder of a model that cannot be used.
        """
        if (memory_listing is None) == (package is None) or target_model is None:
            raise BadInput(
                "a check is of one memory and one target",
                found=f"memory_listing={memory_listing!r}, package={package!r}, "
                f"target_model={target_model!r}"[:200],
                expected="target_model, and either memory_listing or package",
            )
        given = package if memory_listing is None else memory_listing
        assert given is not None
        about = subject(given, self.store, self.shelf)
        case = Case(
            subject=about,
            target=model(target_model, self.shelf),
            config=TargetConfig.read(target_config),
            shelf=self.shelf,
            tokens=about.tokens,
            kind=kind,
        )
        if case.target.geometry is not None:
            case.config.check(case.target.geometry)
        if measure:
            memory = verify(about.path) if about.path else given
            case = measured(case, memory, target_model)
        return report(case)


def measured(case: Case, memory: object, target: str | Path) -> Case:
    """The case with what its memory's own last part says.

    Raises:
        BadInput: nothing that can be measured, or nothing to measure it with.
    """
    reachable = case.target.geometry is not None and (case.exact or case.entry is not None)
    if not isinstance(memory, Package) or not reachable:
        raise BadInput(
            "there is nothing to measure",
            found=f"{case.subject.name}, for {case.target.name}",
            expected="a package, the target's folder, and a W-Matrix between the two models",
            remedy="check without measuring, or fit a W-Matrix with `awareness fit`",
        )
    wmatrix = None if case.exact or case.entry is None else load(case.entry.path)
    tail = 0 if wmatrix is None else case.config.tail
    wrong = another(case.subject)
    found = measure_on_itself(memory, wmatrix, resolve_folder(target), tail, wrong)
    return replace(case, found=found)


def another(subject: Subject) -> Package | None:
    """Another memory of the same source in the same folder, the smallest, for the wrong-memory arm;
    None where there is none."""
    if subject.path is None or subject.source.geometry is None:
        return None
    others = [p for p in subject.path.parent.glob("mem_*.safetensors") if p != subject.path]
    for path in sorted(others, key=lambda p: (p.stat().st_size, p.name)):
        with contextlib.suppress(PackageCorrupt):  # a damaged neighbour is not what was asked for
            manifest = read_manifest(path)
            if manifest.has_text and manifest.geometry.same_model(subject.source.geometry):
                return read(path)
    return None
