"""Whether a W-Matrix still keeps what its certificate says."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.anchors.corpus import load as load_texts
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.files import anchors_dir, home, models_dir
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Protocol
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.registry import locate


@dataclass(frozen=True)
class WMatrixStatus:
    """The result of a check. `version` is the file's format, `last_validated` the certificate's
    date, `accuracy` the retention measured now: None without a certificate, or where a model has
    another cache than the map was fitted for. `reasons` say what drifted."""

    version: str
    last_validated: datetime.date | None
    accuracy: float | None
    drift_detected: bool
    recommendation: str
    reasons: tuple[str, ...] = ()


class WMatrixMonitor:
    """Checks W-Matrices against the models and texts at hand.

        status = WMatrixMonitor().check("gpt4-to-llama3-70b.wmatrix")
        print(f"{status.accuracy:.3f}", status.drift_detected, status.recommendation)

    Args:
        texts: documents to measure on; by default the certificate's own, from the folders of
            `$AWARENESS_HOME/held-out` and `$AWARENESS_HOME/anchors` that it names.
        source, target: the models' folders; by default `$AWARENESS_HOME/models/NAME`.
        sample: how many of the texts are measured.
    """

    def __init__(
        self,
        texts: Sequence[Document] | None = None,
        *,
        source: str | Path | None = None,
        target: str | Path | None = None,
        sample: int = 8,
    ) -> None:
        self.texts, self.source, self.target, self.sample = texts, source, target, sample

    def check(self, wmatrix: str | Path) -> WMatrixStatus:
        """Compare fingerprints, then measure retention on a sample by the certificate's protocol.

        Args:
            wmatrix: a file, or a name under `$AWARENESS_HOME/wmatrices`.

        Raises:
            WMatrixCorrupt: a missing or altered file.
            UnsupportedModel: a model that is not at hand.
            BadInput: the certificate's texts are not at hand, and no others are given.
        """
        matrix = load(locate(wmatrix))
        manifest, certificate = matrix.manifest, matrix.manifest.measured
        if certificate is None:
            remedy = "certify it: it has no certificate"
            return WMatrixStatus(manifest.format, None, None, False, remedy)
        fitted, folders = (manifest.source, manifest.target), self.folders(matrix)
        pairs = [(was, geometry_of(folder)) for was, folder in zip(fitted, folders, strict=True)]
        reasons = [reason for was, now in pairs for reason in changes(was, now)]
        remedy = "fit it again" if reasons else "none: it holds"
        texts = certificate_texts(certificate) if self.texts is None else self.texts
        if not texts and not reasons:
            raise missing_texts(certificate)
        retention = None
        if texts and all(fits(was, now) for was, now in pairs):
            # The harness takes no other weights than the map's: those at hand are put in.
            update = {"source": pairs[0][1], "target": pairs[1][1]}
            matrix = replace(matrix, manifest=manifest.model_copy(update=update))
            retention = self.measured(matrix, folders, texts, certificate.protocol)
            if lost := below(retention, certificate.retention):
                remedy = remedy if reasons else "certify it again"
                reasons.append(lost)
        accuracy, drifted = retention.mean if retention else None, bool(reasons)
        version, day = manifest.format, certificate.measured
        return WMatrixStatus(version, day, accuracy, drifted, remedy, tuple(reasons))

    def folders(self, wmatrix: WMatrix) -> tuple[Path, Path]:
        """The folders of the source and the target."""
        source, target = wmatrix.manifest.source.name, wmatrix.manifest.target.name
        return (
            Path(self.source or models_dir() / source),
            Path(self.target or models_dir() / target),
        )

    def measured(
        self,
        wmatrix: WMatrix,
        folders: tuple[Path, Path],
        texts: Sequence[Document],
        protocol: Protocol,
    ) -> Interval:
        """Retention on a sample of the texts."""
        figures = evaluate_texts(
            EvalHarness(*folders, wmatrix),
            texts,
            context=protocol.context,
            continuation=protocol.continuation,
            limit=self.sample,
            progress=False,
        )
        return Interval(**figures.retention())


def fits(fitted: Geometry, model: Geometry) -> bool:
    """Whether a map for one model can be applied to another: the same shapes, the same tokens."""
    return fitted.same_shape(model) and fitted.hidden_size == model.hidden_size


def below(retention: Interval, certified: Interval) -> str | None:
    """The reason for drift where retention is lower than its certificate says; else None."""
    if retention.ci_high >= certified.ci_low:
        return None
    return (
        f"retention is {retention.mean:.3f} (at most {retention.ci_high:.3f}), the certificate "
        f"says at least {certified.ci_low:.3f}"
    )


def changes(fitted: Geometry, model: Geometry) -> list[str]:
    """What differs between a model as the map was fitted for it and the model at hand."""
    return [
        f"{fitted.name}: {name} changed since the fit"
        for name in ("weights", "tokenizer", "layers")
        if getattr(model, name) != getattr(fitted, name)
    ]


def certificate_texts(certificate: Certificate) -> list[Document]:
    """The texts that a certificate was measured on, from `$AWARENESS_HOME`; none where one of their
    folders is missing or they have changed."""
    roots = (home() / "held-out", anchors_dir(), home())
    paths = [
        next((root / name for root in roots if (root / name).exists()), None)
        for name in source_names(certificate)
    ]
    present = [path for path in paths if path is not None]
    if not present or len(present) < len(paths):
        return []
    documents = load_texts(present)
    return documents if digest(documents) == certificate.protocol.texts else []


def source_names(certificate: Certificate) -> tuple[str, ...]:
    """The folders and files of a certificate's texts. Version 0.1 recorded the folders alone, as
    the kinds of its plans."""
    return certificate.protocol.sources or tuple(
        dict.fromkeys(kind for plan in certificate.plans for kind in plan.kinds)
    )


def missing_texts(certificate: Certificate) -> BadInput:
    """The error that names the texts which a check needs."""
    names, wanted = ", ".join(source_names(certificate)), certificate.protocol.texts[:12]
    return BadInput(
        "the certificate's texts are not at hand",
        found=f"no such texts under {home()}",
        expected=f"the texts with the digest {wanted}"
        + (f", of {names} in {home() / 'held-out'}" if names else ""),
        remedy="put them there, or give texts of the same kinds: WMatrixMonitor(texts), with "
        "awareness_vllm.anchors.corpus.load([PATH, …])",
    )
