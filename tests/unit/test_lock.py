"""`requirements.lock` has all that pyproject.toml asks for, and nothing that could be exchanged."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "tests" / "lock.py"))
ALONE, LEFT_OUT, LOCK, canonical = map(SCRIPT.get, ("ALONE", "LEFT_OUT", "LOCK", "canonical"))
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")
OURS = {"awareness-vllm", "awareness-demo"}
EXTRAS = ("cpu", "sign", "test", "bench")


def locked() -> dict[str, str]:
    """The versions in the lock file, by name."""
    lines = [line for line in LOCK.read_text().splitlines() if line[:1] != "#"]
    pins = [LINE.fullmatch(line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if not pin]
    versions = {pin[1]: pin[2] for pin in pins if pin}
    assert len(versions) == len(lines)
    return versions


def unmet(requirement: str, extras: tuple[str, ...] = ("",)) -> str:
    """What the lock lacks of a requirement, "" where it has it."""
    wanted = Requirement(requirement)
    applies = wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in extras)
    name = canonical(wanted.name)
    if not applies or name in OURS:
        return ""
    version = locked().get(name)
    met = version is not None and wanted.specifier.contains(version, prereleases=True)
    return "" if met else f"{requirement} (locked: {version})"


def test_the_lock_has_what_the_projects_ask_for() -> None:
    wanted = list(ALONE)
    for file in (ROOT / "pyproject.toml", ROOT / "demo" / "pyproject.toml"):
        project = tomllib.loads(file.read_text())["project"]
        wanted += project["dependencies"]
        for extra in EXTRAS:
            wanted += project.get("optional-dependencies", {}).get(extra, [])
    assert [missing for requirement in wanted if (missing := unmet(requirement))] == []


def test_the_lock_has_what_its_packages_ask_for() -> None:
    """It is installed with --no-deps, so nothing else would bring them. As far as installed."""
    alone = {canonical(Requirement(requirement).name) for requirement in ALONE}
    missing = []
    for name, version in locked().items():
        try:
            facts = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in alone or facts.version != version:
            continue
        for requirement in facts.requires or ():
            if canonical(Requirement(requirement).name) not in LEFT_OUT and unmet(requirement):
                missing.append(f"{name} needs {unmet(requirement)}")
    assert missing == []
