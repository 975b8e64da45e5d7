"""Whether a W-Matrix still is what its certificate says."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import evaluate_texts
from awareness_vllm.files import models_dir
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.wmatrix.certificate import Certificate, Interval
from awareness_vllm.wmatrix.file import WMatrix, load


@dataclass(frozen=True)
class WMatrixStatus:
    """What a check found. `accuracy` is the retention measured now, None where that was not
    possible; `reasons` say what drifted."""

    version: str
    last_validated: datetime.date | None
    accuracy: float | None
    drift_detected: bool
    recommendation: str
    reasons: tuple[str, ...] = ()


class WMatrixMonitor:
    """Checks W-Matrices against the models and the texts of today.

    Args:
        texts: the certificate's own texts, or others of the same kinds.
        source, target: the models' folders; by default those of the W-Matrix's names under
            `$AWARENESS_HOME/models`.
        sample: texts that are measured anew.
    """

    def __init__(
        self,
        texts: Sequence[Document],
        *,
        source: str | Path | None = None,
        target: str | Path | None = None,
        sample: int = 8,
    ) -> None:
        self.texts, self.source, self.target, self.sample = texts, source, target, sample

    def check(self, path: str | Path) -> WMatrixStatus:
        """Compare fingerprints, then measure retention on a sample by the certificate's protocol.

        Raises:
            WMatrixCorrupt: the file is not what was written.
            BadInput: no models or texts to measure with.
        """
        wmatrix = load(path)
        manifest = wmatrix.manifest
        if manifest.certificate is None:
            return WMatrixStatus(
                manifest.format, None, None, False, "certify it: it was never measured"
            )
        found = Certificate.model_validate(manifest.certificate)
        folders = [
            Path(given or models_dir() / geometry.name)
            for given, geometry in (
                (self.source, manifest.source),
                (self.target, manifest.target),
            )
        ]
        reasons = tuple(
            reason
            for folder, geometry in zip(folders, (manifest.source, manifest.target), strict=True)
            for reason in changed(folder, geometry)
        )
        if reasons:
            return WMatrixStatus(
                manifest.format, found.measured, None, True, "fit it again", reasons
            )
        now = self.measured(wmatrix, folders, found)
        if now.ci_high < found.retention.ci_low:
            reason = (
                f"retention is {now.mean:.3f} (at most {now.ci_high:.3f}), "
                f"the certificate says at least {found.retention.ci_low:.3f}"
            )
            return WMatrixStatus(
                manifest.format, found.measured, now.mean, True, "certify it again", (reason,)
            )
        return WMatrixStatus(manifest.format, found.measured, now.mean, False, "none: it holds")

    def measured(self, wmatrix: WMatrix, folders: list[Path], found: Certificate) -> Interval:
        """Retention on a sample of the texts, by the certificate's protocol."""
        if not self.texts:
            raise BadInput("no texts to measure on", expected="the certificate's own")
        figures = evaluate_texts(
            EvalHarness(folders[0], folders[1], wmatrix),
            self.texts,
            context=found.protocol.context,
            continuation=found.protocol.continuation,
            limit=self.sample,
            progress=False,
        )
        return Interval(**figures.summary()["retention"])


def changed(folder: Path, geometry: Geometry) -> list[str]:
    """What is no longer as it was when the map was learned."""
    today = geometry_of(folder)
    return [
        f"{folder.name}: {name} changed since the fit"
        for name in ("weights", "tokenizer", "layers")
        if getattr(today, name) != getattr(geometry, name)
    ]
