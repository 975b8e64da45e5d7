"""What of vLLM this project uses is there, in the installed version and in others whose sources lie
in the folders of `VLLM_SOURCES`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from vllm_names import Sources, contract, missing

pytestmark = pytest.mark.unit


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


FOLDERS = [installed(), *map(Path, filter(None, os.environ.get("VLLM_SOURCES", "").split(":")))]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_all_that_is_used_of_vllm_is_there(folder: Path) -> None:
    sources = Sources(folder)
    assert missing(sources) == []
    assert contract(sources) == []


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "config"
    package.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").touch()
    (package / "__init__.py").write_text("from .cache import *\nfrom .vllm import VllmConfig\n")
    (package / "cache.py").write_text(
        "class Base:\n    a: int\nclass CacheConfig(Base):\n    b = 1\n"
    )
    (package / "vllm.py").write_text(
        "class VllmConfig:\n    def __init__(self):\n        self.c = 1\n"
    )
    sources = Sources(tmp_path)
    used = {"vllm.config.CacheConfig": "a b|x d", "vllm.config.VllmConfig": "c", "vllm.No": "e"}
    complaints = missing(sources, used)
    assert complaints[-2:] == ["vllm.config.CacheConfig.d", "no class vllm.No"]
    imports = [complaint for complaint in complaints if ".py: " in complaint]
    assert any(one.endswith("vllm.logger init_logger") for one in imports)
    assert not any(
        one.endswith(("vllm.config VllmConfig", "vllm.config CacheConfig")) for one in imports
    )
    assert contract(sources)
