"""The repository's shape: what is installed under which name, and what an import costs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_kernels_is_a_folder_and_not_a_package() -> None:
    # transformers imports a PyPI package of that name; this one would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("awareness_vllm", "kernels", "tests", "benchmarks", "demo", "examples", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "awareness_vllm",
        "awareness_kernels",
    }
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "awareness_vllm").rglob("*.py")}
    assert wanted <= set(names)
    assert {"awareness_vllm/py.typed", "awareness_kernels/py.typed"} <= set(names)
    assert "awareness_vllm/compatibility/priors.json" in names
    html = ROOT / "awareness_vllm" / "compatibility" / "html"
    beside = {path.relative_to(ROOT).as_posix() for path in html.iterdir() if path.is_file()}
    assert "awareness_vllm/compatibility/html/page.html.j2" in beside
    assert beside <= set(names)


@pytest.mark.parametrize(
    "module", ["awareness_vllm", "awareness_vllm.errors", "awareness_vllm.files"]
)
def test_a_light_module_loads_neither_torch_nor_vllm(module: str) -> None:
    code = f"import sys, {module}; print({{'torch', 'vllm', 'transformers'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert result.stdout.strip() == "set()"
