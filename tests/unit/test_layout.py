"""The repository's shape: what is installed under which name, and what an import costs."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

from awareness_vllm.cli import main

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


def test_kernels_is_a_folder_and_not_a_package() -> None:
    # transformers imports a PyPI package of that name; this one would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
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


def test_a_subcommand_imports_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    load = importlib.import_module
    monkeypatch.setattr(
        importlib, "import_module", lambda name: imported.append(name) or load(name)
    )
    with pytest.raises(SystemExit) as end:
        main.main(["inspect", "--help"])
    assert not end.value.code
    assert imported == ["awareness_vllm.cli.inspect"]


FLOORS = (
    ("errors",),
    ("schema", "files"),
    ("provenance", "kernels", "tensor_file"),
    ("trust",),
    ("oci",),
    ("anchors", "models"),
    ("packages", "passages"),
    ("wmatrix",),
    ("marketplace",),
    ("align",),
    ("fit", "evaluate"),
    ("aligners", "compatibility"),
    ("published",),
    ("serving",),
    ("cli",),
)
"""The folders and files of `awareness_vllm`, from the ground up: each imports lower floors only."""
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
Edges = dict[str, set[str]]


def python_files() -> list[Path]:
    """Every Python file of the repository."""
    folders = ("awareness_vllm", "kernels", "demo", "benchmarks", "examples", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def statements(path: Path) -> list[ast.AST]:
    """A file's imports and functions, wherever in it: they are never within an expression."""
    found: list[ast.AST] = []
    queue: list[ast.AST] = [ast.parse(path.read_text())]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(node)
        for below in ("body", "orelse", "finalbody", "handlers", "cases"):
            queue += getattr(node, below, ())
    return found


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, late and for types alike."""
    modules: set[str] = set()
    for node in statements(path):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # Of a package, what is imported is the module of that name, if there is one.
            submodules = {n for n in names if (ROOT / (n.replace(".", "/") + ".py")).is_file()}
            modules |= submodules or {node.module}
    return modules


@pytest.fixture(scope="module")
def edges() -> Edges:
    """What each module of the product imports. The package's face hands names on, late."""
    files = [path for path in (ROOT / "awareness_vllm").rglob("*.py") if path.name != "__init__.py"]
    return {module_of(path): imports_of(path) for path in files}


def circles(edges: Edges) -> list[list[str]]:
    """Groups of modules that import each other."""
    reachable: Edges = {}
    for module in edges:
        seen, queue = set(), [module]
        while queue:
            new = edges.get(queue.pop(), set()) & edges.keys() - seen
            seen |= new
            queue += new
        reachable[module] = seen
    groups = {
        frozenset(other for other in reachable[m] if m in reachable[other])
        for m in edges
        if m in reachable[m]
    }
    return [sorted(group) for group in groups]


def against_the_floors(edges: Edges) -> list[str]:
    """Imports from a lower floor, or between rooms of one floor."""
    level = {room: i for i, floor in enumerate(FLOORS) for room in floor}
    found = []
    for module, imported in edges.items():
        room = module.split(".")[1]
        for other in imported:
            at = other.split(".")[1] if other.startswith("awareness_vllm.") else room
            if at != room and level[at] >= level[room]:
                found.append(f"{module} imports {other}")
    return sorted(found)


def test_no_circle_and_no_import_against_the_floors(edges: Edges) -> None:
    assert circles(edges) == []
    assert against_the_floors(edges) == []


def test_no_benchmarks_import_each_other() -> None:
    scripts = (ROOT / "benchmarks").rglob("*.py")
    names = {module_of(path).removeprefix("benchmarks."): imports_of(path) for path in scripts}
    assert "fuzz.container" in names["fuzz.oracle"]
    assert circles(names) == []


def test_the_checks_of_the_layout_find_what_they_look_for() -> None:
    edges = {
        "awareness_vllm.fit.a": {"awareness_vllm.fit.b"},
        "awareness_vllm.fit.b": {"awareness_vllm.fit.a", "awareness_vllm.evaluate.c"},
        "awareness_vllm.models.d": {"awareness_vllm.fit.a", "awareness_vllm.errors"},
    }
    assert circles(edges) == [["awareness_vllm.fit.a", "awareness_vllm.fit.b"]]
    assert against_the_floors(edges) == [
        "awareness_vllm.fit.b imports awareness_vllm.evaluate.c",
        "awareness_vllm.models.d imports awareness_vllm.fit.a",
    ]


def test_only_serving_imports_vllm_and_serving_imports_no_fit(edges: Edges) -> None:
    for module, imported in edges.items():
        served = module.startswith("awareness_vllm.serving.")
        roots = {name.split(".")[0] for name in imported}
        assert served or "vllm" not in roots, module
        if served:
            assert not any(name.startswith("awareness_vllm.fit") for name in imported), module


def test_no_file_and_no_function_is_too_long() -> None:
    long = []
    for path in python_files():
        name = path.relative_to(ROOT)
        if (lines := path.read_bytes().count(b"\n")) > LONGEST_FILE:
            long.append(f"{name}: {lines} lines")
        for node in statements(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{name}: {node.name} has {lines} lines")
    assert long == []
