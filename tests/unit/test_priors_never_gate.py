"""A published figure is never taken for a certificate, and nothing is served on it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import ValidationError

from awareness_vllm.cli.main import main
from awareness_vllm.compatibility.priors import published_retention
from awareness_vllm.compatibility.report import Basis
from awareness_vllm.errors import QualityUnreachable
from awareness_vllm.serving.resolved_memory import Promise, ResolvedMemory
from awareness_vllm.wmatrix.certificate import Certificate, Interval, Plan
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.plans import cheapest
from awareness_vllm.wmatrix.registry import WMatrixEntry

pytestmark = pytest.mark.unit


def test_a_prior_is_no_certificate() -> None:
    found = published_retention("gpt-4", "llama-3.1", 32_000)
    assert found is not None
    interval, basis = found
    for prior in (interval, basis):
        assert not isinstance(prior, Certificate | Plan)
        for kind in (Certificate, Plan):
            with pytest.raises(ValidationError):
                kind.model_validate(prior.model_dump())
            with pytest.raises(ValidationError):
                kind.model_validate(prior)
    assert get_type_hints(cheapest)["certificate"] is Certificate
    assert get_type_hints(WMatrixEntry.certificate.func)["return"] == Certificate | None


@pytest.fixture
def filled(wmatrix: WMatrix, tmp_path: Path) -> Path:
    """A W-Matrix that gives published figures out as its certificate."""
    interval, basis = published_retention("gpt-4", "llama-3.1", 32_000) or (None, None)
    assert isinstance(interval, Interval)
    assert isinstance(basis, Basis)
    figure = interval.model_dump()
    document = {"retention": figure, "facts": figure, "basis": basis.model_dump(), "tier": 1}
    path = tmp_path / "pair.wmatrix"
    manifest = wmatrix.manifest.model_copy(update={"certificate": document})
    replace(wmatrix, manifest=manifest).save(path)
    return path


def test_a_map_with_priors_for_a_certificate_is_not_certified(
    filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = WMatrixEntry.read(filled)
    assert entry.manifest.certificate is not None
    assert entry.certificate is None
    assert entry.manifest.standing == "not certified"
    assert main(["inspect", str(filled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["certified"] is False
    assert main(["inspect", str(filled)]) == 0
    assert "not certified" in capsys.readouterr().out


def test_nothing_is_served_on_a_prior(filled: Path) -> None:
    memory = ResolvedMemory("mem_", "", "own", WMatrixEntry.read(filled), ids=[0] * 300, prefix=1)
    assert memory.promise() == Promise()
    with pytest.raises(QualityUnreachable, match="not certified"):
        memory.plan(0.1, tails=True)
