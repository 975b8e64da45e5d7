"""Checks of this machine and installation, with a remedy for whatever they lack."""

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
from awareness_vllm.serving.plugin import supported_version
from awareness_vllm.wmatrix.registry import WMatrixEntry

PLUGIN = "awareness"
PLUGIN_GROUPS = ("vllm.general_plugins", "vllm.endpoint_plugins")
CUDA_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of a CPU build of vLLM that come as CUDA builds, which a CPU build of torch cannot
load."""


class Check(FrozenModel):
    """One check's result, with a remedy where something is amiss."""

    name: str
    status: Literal["ok", "warning", "problem"]
    found: str
    remedy: str | None = None


def ok(name: str, found: str) -> Check:
    return Check(name=name, status="ok", found=found)


def warning(name: str, found: str, remedy: str | None) -> Check:
    return Check(name=name, status="warning", found=found, remedy=remedy)


def problem(name: str, found: str, remedy: str | None) -> Check:
    return Check(name=name, status="problem", found=found[:300], remedy=remedy)


def checks(wmatrices: Sequence[Path] = (), target: str | None = None) -> list[Check]:
    """All checks but that of the machine's speed."""
    geometry, target_checks = check_target(target)
    return [
        *libraries(),
        vllm(),
        *broken_builds(),
        devices(),
        allowed_plugins(os.environ),
        registered_plugins(),
        writable_home(),
        *target_checks,
        contents("models", models_dir(), "*/config.json", "`make models`, or give models' folders"),
        contents("anchors", anchors_dir(), "*/", "`make anchors`, or give `fit` texts of your own"),
        *check_wmatrices(wmatrices, geometry),
    ]


def libraries() -> Iterator[Check]:
    """Python, torch and transformers; without one of them this would not run."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    yield ok("python", platform.python_version())
    yield ok("torch", f"{torch.__version__}, {build}")
    yield ok("transformers", importlib.metadata.version("transformers"))


def vllm() -> Check:
    """Capture and fit work without vLLM, serving does not."""
    try:
        return ok("vllm", supported_version())
    except BadInput as error:
        if error.found is None:
            return warning("vllm", "not installed: no serving", error.remedy)
        return problem("vllm", f"{error.found}, not supported", error.remedy)


def broken_builds() -> Iterator[Check]:
    """CUDA builds beside a CPU build of torch: they break the import of transformers and vLLM."""
    for name in CUDA_EXTRAS:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
            yield ok(name, "works")
        except Exception as error:
            fault = f"cannot be imported ({type(error).__name__}: {error})"
            yield problem(name, fault, f"pip uninstall -y {name}: nothing here needs it")


def devices() -> Check:
    """The hardware that the target would run on. `load_times_s` only speaks for CPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ", ".join([hardware(), f"{torch.get_num_threads()} threads", *gpus])
    if gpus:
        return warning("devices", names, "load times are predicted for CPU servers only")
    return ok("devices", names)


def allowed_plugins(environ: Mapping[str, str]) -> Check:
    """`VLLM_PLUGINS` is an allow-list: one without us makes vLLM serve without memories."""
    name, allowed = "plugins allowed", environ.get("VLLM_PLUGINS")
    if allowed is None:
        # Endpoint plugins only load where they are named.
        return ok(name, "VLLM_PLUGINS is not set: `awareness serve` sets it for its server")
    if PLUGIN in allowed.split(","):
        return ok(name, f"VLLM_PLUGINS={allowed}")
    remedy = f"add {PLUGIN} to it, or start servers with `awareness serve`"
    return warning(name, f"VLLM_PLUGINS={allowed}", remedy)


def registered_plugins() -> Check:
    """Whether vLLM can find our plugins at all."""
    missing = [
        group
        for group in PLUGIN_GROUPS
        if PLUGIN not in {entry.name for entry in importlib.metadata.entry_points(group=group)}
    ]
    if missing:
        remedy = "install this package with pip into the environment of vLLM"
        return problem("plugins registered", f"nothing in {', '.join(missing)}", remedy)
    return ok("plugins registered", ", ".join(PLUGIN_GROUPS))


def writable_home() -> Check:
    try:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            return ok("home", str(home()))
    except OSError as error:
        return problem("home", str(error), "set AWARENESS_HOME to a folder that can be written")


def check_target(target: str | None) -> tuple[Geometry | None, list[Check]]:
    """The geometry of the target, and whether it can be served with memories."""
    if target is None:
        return None, []
    try:
        geometry = geometry_of(target)
    except AwarenessError as error:
        return None, [problem("target", f"{error.what}: {error.found}", error.remedy)]
    facts = f"{geometry.name}: {len(geometry.layers)} layers, {geometry.max_positions} positions"
    return geometry, [ok("target", facts)]


def contents(name: str, folder: Path, pattern: str, remedy: str) -> Check:
    """The files in one of our folders; a fresh home has none."""
    names = sorted(path.relative_to(folder).parts[0] for path in folder.glob(pattern))
    return ok(name, ", ".join(names)) if names else warning(name, f"none in {folder}", remedy)


def check_wmatrices(named: Sequence[Path], target: Geometry | None) -> Iterator[Check]:
    """The files that were named and those at home: readable, certified, leading to the target."""
    folder = wmatrices_dir()
    paths = [*named, *sorted(folder.glob("*.wmatrix"))]
    if not paths:
        none = f"none in {folder}: only memories of the served model itself can be loaded"
        yield warning("W-Matrix", none, "`awareness fit`")
    entries = []
    for path in paths:
        try:
            entries.append(WMatrixEntry.read(path))
            yield check_certificate(entries[-1])
        except AwarenessError as error:
            fault = f"{path.name} cannot be used: {error.found}"[:300]
            yield (problem if path in named else warning)("W-Matrix", fault, error.remedy)
    if target and not any(entry.manifest.target.same_model(target) for entry in entries):
        none = f"none leads to {target.name} with these exact weights"
        yield warning("W-Matrix", none, "`awareness fit`")


def check_certificate(entry: WMatrixEntry) -> Check:
    """Whether a map's retention was measured."""
    if entry.certificate is None:
        return warning("W-Matrix", f"{entry}: not certified", "`awareness certify`")
    return ok("W-Matrix", f"{entry}: {entry.manifest.standing}")


def speed(calibration: Calibration) -> Check:
    """The measured rates of this machine, and whether other work disturbed the measurement."""
    rates = (
        f"read {calibration.read_bytes_per_s / 1e9:.2g} GB/s, "
        f"align {calibration.align_flop_per_s / 1e9:.3g} GFLOP/s, "
        f"write {calibration.write_bytes_per_s / 1e9:.2g} GB/s"
    )
    if not calibration.disturbed:
        return ok("speed", rates)
    rates += f"; measured beside other work (load {calibration.load:.1f})"
    return warning("speed", rates, "run `awareness doctor --again` when nothing else runs")
