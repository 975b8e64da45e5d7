"""Alignment on demand: a map for two models within a budget of time, certified and registered."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from awareness_vllm.aligners.probe import choose_layers, measure
from awareness_vllm.anchors.corpus import Document, digest, split, text_digest
from awareness_vllm.errors import ArtefactNotFound, AwarenessError, BadInput
from awareness_vllm.evaluate.certify import Extent, certify
from awareness_vllm.evaluate.evaluate import Case
from awareness_vllm.files import atomic_write, wmatrices_dir
from awareness_vllm.fit.budget import Plan, plan_fit
from awareness_vllm.fit.config import Deadlines, FitConfig
from awareness_vllm.fit.fit import fit, read_by
from awareness_vllm.fit.gather import least_rows
from awareness_vllm.fit.progress import say
from awareness_vllm.fit.reader import Reader
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.wmatrix.file import REGISTERED, WMatrix, load
from awareness_vllm.wmatrix.versions import push_version

MOST_LESSONS = 4000
"""Different calibration texts at most; of a fast machine they are gone through again."""


@dataclass(frozen=True)
class Aligned:
    """What came of an alignment on demand: the registered `path`, the map, the `plan`, and what it
    `took`, in seconds by phase; `resumed` where a killed run's work was gone on with."""

    path: Path
    wmatrix: WMatrix
    plan: Plan
    budget: float
    took: dict[str, float]
    resumed: bool

    @property
    def overrun(self) -> float:
        """Seconds beyond the budget; negative where some were left."""
        return sum(self.took.values()) - self.budget


@dataclass(frozen=True)
class Work:
    """The unfinished work of an alignment: its plan, the fit's checkpoint, the map before it is
    certified. It is found again by the same models, anchors, settings and budget."""

    folder: Path
    key: str

    @classmethod
    def of(
        cls,
        name: str,
        reader: Reader,
        anchors: Sequence[Document],
        config: FitConfig,
        budget: float,
    ) -> Work:
        """The work of the alignment of a name."""
        weights = [g.weights for g in (reader.source_geometry, reader.target_geometry)]
        key = json.dumps([*weights, digest(anchors), asdict(config), budget])
        return cls(wmatrices_dir() / f".{name}.on-demand", key)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "fit"

    @property
    def fitted(self) -> Path:
        """The finished map, not certified yet."""
        return self.folder / "fitted.wmatrix"

    def plan(self) -> tuple[Plan, FitConfig] | None:
        """The plan of a killed run, and its fit's configuration; else the folder is made anew."""
        # None, another version's or a torn one: all the same as no plan.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = json.loads((self.folder / "plan.json").read_text())
            if document["key"] == self.key:
                return Plan.restored(document["plan"]), FitConfig(**document["config"])
        shutil.rmtree(self.folder, ignore_errors=True)
        return None

    def save_plan(self, plan: Plan, config: FitConfig) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {"key": self.key, "plan": plan.as_json(), "config": asdict(config)}
        with atomic_write(self.folder / "plan.json") as draft:
            draft.write_text(json.dumps(document))

    def register(self, wmatrix: WMatrix, name: str, registry: str | Path | None) -> Path:
        """Save the finished map under its name, after which nothing is unfinished, then push it."""
        path = wmatrix.register(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        if registry is not None:
            push_version(path, name, open_repository(registry))
        return path

    def restored(self) -> WMatrix | None:
        """The finished map of a killed run."""
        try:
            return load(self.fitted) if self.fitted.is_file() else None
        except AwarenessError:
            return None


def align_on_demand(
    source: str | Path,
    target: str | Path,
    *,
    anchors: Sequence[Document],
    texts: Sequence[Document],
    cases: Sequence[Case],
    budget: float,
    name: str | None = None,
    registry: str | Path | None = None,
    config: FitConfig | None = None,
    begun: float | None = None,
    progress: bool = True,
) -> Aligned:
    """A certified map from one model to another, fitted within a budget and registered.

    Args:
        texts, cases: from sources that no anchor came from, to certify by.
        budget: seconds, for all of it.
        name: in `$AWARENESS_HOME/wmatrices`; by default the models' names.
        registry: where it is published, too.
        config: settings of the fit other than its counts.
        begun: the time, by `time.monotonic`, at which the budget began; now by default.

    Raises:
        BadInput: a budget that is too small, once that was measured; a name that is taken; texts
            that are anchors, or that measure nothing: the fitted map stays in the work's folder.
        UnsupportedModel; RegistryError, RegistryDenied: before anything is done, or once the map is
            registered here.
    """
    begun = time.monotonic() if begun is None else begun
    config = (config or FitConfig()).resolved()
    disjoint(anchors, texts)
    if registry is not None:
        check_registry(registry)
    reader = read_by(source, target, config)
    name = free_name(name or default_name(reader))
    work = Work.of(name, reader, anchors, config, budget)
    resumed = work.plan()
    plan, config = resumed or make_plan(reader, anchors, texts, config, budget, begun)
    work.save_plan(plan, config)
    took = {"measure": time.monotonic() - begun}
    say("\n".join(plan.lines(budget)), progress)
    ends, mark = begun + budget, time.monotonic()
    if (wmatrix := work.restored()) is None:
        wmatrix = fit(
            source, target, anchors, config, folder=work.checkpoint, progress=progress,
            reader=reader, deadlines=deadlines_of(plan, ends),
        )  # fmt: skip
        wmatrix.save(work.fitted)
    took["fit"], mark = time.monotonic() - mark, time.monotonic()
    del reader
    gc.collect()  # the certification loads both models anew
    wmatrix = certified(
        wmatrix, (source, target), (texts, cases), plan, ends, config.device, progress=progress
    )
    took["certify"], mark = time.monotonic() - mark, time.monotonic()
    path = work.register(wmatrix, name, registry)
    took["register"] = time.monotonic() - mark
    return Aligned(path, wmatrix, plan, budget, took, resumed is not None)


def certified(
    wmatrix: WMatrix,
    models: tuple[str | Path, str | Path],
    judges: tuple[Sequence[Document], Sequence[Case]],
    plan: Plan,
    ends: float,
    device: str,
    *,
    progress: bool,
) -> WMatrix:
    """A map with a certificate, measured until a time at most but for what was begun."""
    try:
        return certify(
            wmatrix,
            *models,
            *judges,
            limit=plan.judged,
            device=device,
            progress=progress,
            extent=extent_of(plan, ends),
        )
    except AwarenessError:
        say("the fitted map is kept: the same command goes on with its certification", True)
        raise


def make_plan(
    reader: Reader,
    anchors: Sequence[Document],
    texts: Sequence[Document],
    config: FitConfig,
    budget: float,
    begun: float,
) -> tuple[Plan, FitConfig]:
    """The plan for a budget by a measurement of this machine, and the fit's configuration by it.

    Raises:
        BadInput: too small a budget.
    """
    train = split(list(anchors), config.held_out, config.seed)[0]
    layers = choose_layers(reader, config, budget)
    config = replace(config, layers=layers, rank=rank_of(reader, config))
    speeds = measure(reader, train, texts, config, begun)
    features = least_rows(reader)
    plan = plan_fit(speeds, budget, features, features)
    lessons = min(MOST_LESSONS, 2 * plan.steps * config.batch)
    return plan, replace(config, tokens=plan.tokens, calibration=lessons)


def rank_of(reader: Reader, config: FitConfig) -> int:
    """The latent's width, within what the models have."""
    return min(config.rank, reader.target_geometry.width, reader.width)


def deadlines_of(plan: Plan, ends: float) -> Deadlines:
    """When reading anchors and calibrating end, for all of it to end at a time."""
    speeds = plan.speeds
    calibrated = ends - speeds.after(plan.judged)
    # Anchors that are read more slowly than was measured take at most half of the calibration.
    solved = speeds.weighing + speeds.solving
    return Deadlines(calibrated - solved - plan.steps * speeds.step / 2, calibrated)


def extent_of(plan: Plan, ends: float) -> Extent:
    """What is certified: the plans that are served by default, and no text and no case that would
    be begun too late to end at a time."""
    speeds, begins = plan.speeds, time.monotonic() + plan.speeds.loading
    left = max(0.0, ends - speeds.metrics - 2 * speeds.case - begins)
    share = speeds.text / (speeds.text + speeds.case)
    return Extent(True, begins + share * left, begins + left)


def check_registry(registry: str | Path) -> None:
    """Raises BadInput for what is no registry, RegistryError for one that does not answer: now, and
    not when a map is there to be pushed."""
    with contextlib.suppress(ArtefactNotFound):  # a repository that will be made
        next(iter(open_repository(registry).tags()), None)


def default_name(reader: Reader) -> str:
    """A map's name by its models' names."""
    names = (reader.source_geometry.name, reader.target_geometry.name)
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._").lower() for name in names]
    return "--".join(part[:48] for part in parts)


def free_name(name: str) -> str:
    """A name that no registered map has. Raises BadInput."""
    if not REGISTERED.fullmatch(name):
        raise BadInput("not a W-Matrix name", found=repr(name), expected=REGISTERED.pattern)
    if (path := wmatrices_dir() / f"{name}.wmatrix").exists():
        raise BadInput(
            f"there is a W-Matrix named {name} already",
            found=path,
            expected="a name of its own",
            remedy="give another --name, or move the file away; `awareness inspect` shows what "
            "that map was measured to keep",
        )
    return name


def disjoint(anchors: Sequence[Document], texts: Sequence[Document]) -> None:
    """Raises BadInput where a text of the certification is an anchor, too."""
    known = {text_digest(document.text) for document in anchors}
    both = [document.name for document in texts if text_digest(document.text) in known]
    if both:
        raise BadInput(
            "texts to certify by are among the anchors",
            found=f"{len(both)} of {len(texts)}: {', '.join(both[:3])}",
            expected="texts from sources that no anchor came from",
            remedy="give other --texts, or other --anchors",
        )


def summary(aligned: Aligned) -> dict[str, Any]:
    """An alignment as a command prints it."""
    certificate = aligned.wmatrix.manifest.measured
    assert certificate is not None
    manifest = aligned.wmatrix.manifest
    return {
        "path": str(aligned.path),
        "bytes": aligned.path.stat().st_size,
        "source": manifest.source.name,
        "target": manifest.target.name,
        "budget": aligned.budget,
        "seconds": sum(aligned.took.values()),
        "overrun": aligned.overrun,
        "resumed": aligned.resumed,
        "plan": {"tokens": aligned.plan.tokens, "steps": aligned.plan.steps}
        | {"judged": aligned.plan.judged, "phases": aligned.plan.phases},
        "took": aligned.took,
        "anchors": manifest.anchors.tokens,
        "layers": list(manifest.layers),
        "rank": manifest.rank,
        "r2": manifest.r2,
        "counts": certificate.counts,
        "retention": certificate.retention.model_dump(),
        "facts": certificate.facts.model_dump(),
        "tier": certificate.tier,
        "standing": manifest.standing,
    }
