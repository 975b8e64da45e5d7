"""What this machine and installation have, what they lack, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch

from awareness_vllm.compatibility.load_time.speed import Calibration
from awareness_vllm.errors import AwarenessError, BadInput
from awareness_vllm.files import anchors_dir, home, models_dir, wmatrices_dir
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.provenance import hardware
from awareness_vllm.schema import FrozenModel
from awareness_vllm.serving.plugin import supported_version, vllm_version
from awareness_vllm.wmatrix.registry import WMatrixEntry

Status = Literal["ok", "warning", "problem"]

PLUGIN = "awareness"
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
DRAGGED_IN = ("torchvision", "torchaudio", "torchcodec")
"""What a CPU build of vLLM brings along in CUDA builds, which a CPU build of torch cannot load."""


class Check(FrozenModel):
    """One thing that was looked at, with a remedy where it is not as it should be."""

    name: str
    status: Status
    found: str
    remedy: str | None = None


def checks(wmatrices: Sequence[Path] = (), target: str | None = None) -> list[Check]:
    """Everything but the machine's speed."""
    geometry, about_target = look_at_target(target)
    return [
        *libraries(),
        vllm(),
        *broken_builds(),
        devices(),
        allowed_plugins(os.environ),
        registered_plugins(),
        writable_home(),
        *about_target,
        at_hand("models", models_dir(), "*/config.json", "`make models`, or give models' folders"),
        at_hand("anchors", anchors_dir(), "*/", "`make anchors`, or give `fit` texts of your own"),
        *look_at_wmatrices(wmatrices, geometry),
    ]


def libraries() -> Iterator[Check]:
    """Python, torch and transformers; without one of them this would not run."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    yield Check(name="python", status="ok", found=platform.python_version())
    yield Check(name="torch", status="ok", found=f"{torch.__version__}, {build}")
    found = importlib.metadata.version("transformers")
    yield Check(name="transformers", status="ok", found=found)


def vllm() -> Check:
    """Capture and fit work without vLLM, serving does not."""
    try:
        return Check(name="vllm", status="ok", found=supported_version())
    except BadInput as error:
        missing = error.found is None
        return Check(
            name="vllm",
            status="warning" if missing else "problem",
            found="not installed: no serving" if missing else f"{vllm_version()}, not supported",
            remedy=error.remedy,
        )


def broken_builds() -> Iterator[Check]:
    """CUDA builds beside a CPU build of torch: they break the import of transformers and vLLM."""
    for name in DRAGGED_IN:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
            yield Check(name=name, status="ok", found="works")
        except Exception as error:
            yield Check(
                name=name,
                status="problem",
                found=f"cannot be imported ({type(error).__name__}: {error})"[:300],
                remedy=f"pip uninstall -y {name}: nothing here needs it",
            )


def devices() -> Check:
    """Where the target would run. `load_times_s` only speaks for CPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(
        name="devices",
        status="warning" if gpus else "ok",
        found=", ".join([hardware(), f"{torch.get_num_threads()} threads", *gpus]),
        remedy="load times are predicted for CPU servers only" if gpus else None,
    )


def allowed_plugins(environ: Mapping[str, str]) -> Check:
    """`VLLM_PLUGINS` is an allow-list: one without us makes vLLM serve without memories."""
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is None:
        # Endpoint plugins only load where they are named.
        found = "VLLM_PLUGINS is not set: `awareness serve` sets it for its server"
        return Check(name="plugins allowed", status="ok", found=found)
    named = PLUGIN in allowed.split(",")
    return Check(
        name="plugins allowed",
        status="ok" if named else "warning",
        found=f"VLLM_PLUGINS={allowed}",
        remedy=None if named else f"add {PLUGIN} to it, or start servers with `awareness serve`",
    )


def registered_plugins() -> Check:
    """Whether vLLM can find us at all."""
    missing = [
        group
        for group in PLUGIN_GROUPS
        if PLUGIN not in {entry.name for entry in importlib.metadata.entry_points(group=group)}
    ]
    return Check(
        name="plugins registered",
        status="problem" if missing else "ok",
        found=f"nothing in {', '.join(missing)}" if missing else ", ".join(PLUGIN_GROUPS),
        remedy="install this package with pip into the environment of vLLM" if missing else None,
    )


def writable_home() -> Check:
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            return Check(name="home", status="ok", found=str(home()))
    except OSError as error:
        remedy = "set AWARENESS_HOME to a folder that can be written"
        return Check(name="home", status="problem", found=str(error), remedy=remedy)


def look_at_target(target: str | None) -> tuple[Geometry | None, list[Check]]:
    """The geometry of the target that is asked for, and whether it can be served with memories."""
    if target is None:
        return None, []
    try:
        found = geometry_of(target)
    except AwarenessError as error:
        says = f"{error.what}: {error.found}"
        return None, [Check(name="target", status="problem", found=says, remedy=error.remedy)]
    says = f"{found.name}: {len(found.layers)} layers, {found.max_positions} positions"
    return found, [Check(name="target", status="ok", found=says)]


def at_hand(name: str, folder: Path, pattern: str, remedy: str) -> Check:
    """What lies in one of our folders; a fresh home has none of it."""
    found = sorted(path.relative_to(folder).parts[0] for path in folder.glob(pattern))
    return Check(
        name=name,
        status="ok" if found else "warning",
        found=", ".join(found) or f"none in {folder}",
        remedy=None if found else remedy,
    )


def look_at_wmatrices(given: Sequence[Path], target: Geometry | None) -> Iterator[Check]:
    """The files that were named and those at home: readable, certified, leading to the target."""
    folder = wmatrices_dir()
    paths = [*given, *sorted(folder.glob("*.wmatrix"))]
    if not paths:
        none = f"none in {folder}: only memories of the served model itself can be loaded"
        yield Check(name="W-Matrix", status="warning", found=none, remedy="`awareness fit`")
    entries = []
    for path in paths:
        try:
            entries.append(WMatrixEntry.read(path))
            yield certified(entries[-1])
        except AwarenessError as error:
            yield Check(
                name="W-Matrix",
                status="problem" if path in given else "warning",
                found=f"{path.name} cannot be used: {error.found}"[:300],
                remedy=error.remedy,
            )
    if target and not any(entry.manifest.target.same_model(target) for entry in entries):
        says = f"none leads to {target.name} with these exact weights"
        yield Check(name="W-Matrix", status="warning", found=says, remedy="`awareness fit`")


def certified(entry: WMatrixEntry) -> Check:
    """Whether anybody has measured what a map keeps."""
    measured = entry.certificate is not None
    return Check(
        name="W-Matrix",
        status="ok" if measured else "warning",
        found=f"{entry}: {entry.manifest.standing}" if measured else f"{entry}: not certified",
        remedy=None if measured else "`awareness certify`",
    )


def speed(calibration: Calibration) -> Check:
    """What was measured of this machine, and whether anything else was running on it."""
    rates = (
        f"read {calibration.read_bytes_per_s / 1e9:.2g} GB/s",
        f"align {calibration.align_flop_per_s / 1e9:.3g} GFLOP/s",
        f"write {calibration.write_bytes_per_s / 1e9:.2g} GB/s",
    )
    busy = f"; measured beside other work (load {calibration.load:.1f})"
    return Check(
        name="speed",
        status="warning" if calibration.disturbed else "ok",
        found=", ".join(rates) + (busy if calibration.disturbed else ""),
        remedy="run `awareness doctor --again` when nothing else runs"
        if calibration.disturbed
        else None,
    )
