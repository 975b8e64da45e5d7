"""The benchmarks of facts and of first tokens through the server: their figures and tables."""

from __future__ import annotations

import math
from pathlib import Path

import certificate_tables
import first_token
import pytest
import served_facts
from test_plans import certified, interval, plan

pytestmark = pytest.mark.unit


def question(kind: str, **right: bool) -> served_facts.Question:
    asked = served_facts.Question({"kind": kind, "answer": " a"}, "mem_", {}, 1, 30)
    asked.answers = {
        arm: (right.get(arm, False), 0.1 * (i + 1)) for i, arm in enumerate(served_facts.ARMS)
    }
    asked.seconds = {"warm": 0.02, "hot": 0.01}
    return asked


def test_figures_are_shares_of_native_with_margins_by_kind() -> None:
    asked = [
        question("single", native=True, default=True, quotes=True, reread=True),
        question("single", native=True, default=True, memory=True),
        question("spread", native=True, default=True, truncation=True),
        question("spread"),
    ]
    found = served_facts.figures(asked, 0.125)
    assert found["exact"] == {
        "native": 0.75, "memory": 0.25, "reread": 0.25, "default": 0.75,
        "truncation": 0.25, "quotes": 0.25, "bm25": 0.0,
    }  # fmt: skip
    assert found["of_native"]["default"]["mean"] == 1
    assert found["of_native"]["margins"]["quotes"]["mean"] == pytest.approx(2 / 3)
    assert found["kinds"]["spread"]["truncation"] == 0.5
    assert found["first_token_ms"] == {
        "native": 100, "memory": 200, "reread": 300, "default": 400,
        "truncation": 500, "quotes": 600, "bm25": 700,
        "default, warm": 20, "default, hot": 10,
    }  # fmt: skip
    assert "| 300 | 12% | 0.75 | 0.25 | 0.25 | 0.75 |" in served_facts.table({"300": found})


def test_a_length_that_native_cannot_answer_has_no_shares() -> None:
    found = served_facts.figures([question("sum", default=True)] * 2, 0.1)
    assert found["of_native"] == {}
    assert "| 1.00 | 0.00 | 0.00 | 0.00 |  |" in served_facts.table({"300": found})


def test_first_tokens_of_latents_are_paired_without_what_was_no_load(tmp_path: Path) -> None:
    assert first_token.is_load({"plan": "load", "temperature": "warm"}, "warm")
    for way, temperature in (("recompute", "warm"), ("load", "recomputed"), ("load", "cold")):
        assert not first_token.is_load({"plan": way, "temperature": temperature}, "warm")
    ids = [f"mem_{i:032x}" for i in range(3)]
    for i, memory in enumerate(ids):
        (tmp_path / first_token.file_of(memory)).write_bytes(bytes(4 - i))
    turns = first_token.Turns(first_token.Client("http://localhost"), tmp_path, {"text": ids})
    turns.seconds |= {
        "native": [4.0, 6.0, 8.0],
        "plain, cold": [2.0, 3.0, 4.0],
        "latent, cold": [1.0, 1.5, math.nan],
    }
    turns.tokens |= {"plain, cold": ["a", "b", "c"], "latent, cold": ["a", "x", "c"]}
    found = turns.figures()
    assert (found["n"], found["refused"]) == (2, 1)
    assert found["bytes"] == {"plain": 4, "latent": 3, "int8": 2}
    latent = found["first_token"]["latent, cold"]
    assert (latent["ms"], latent["sooner than native"]["ratio"]) == (1250, 4)
    assert latent["of plain"] == {"ratio": 0.5, "interval": [0.5, 0.5]}
    assert latent["same token"] == "2 of 3"


def test_the_tables_of_a_certificate_have_every_plan_and_control() -> None:
    more = {"margin": interval(0.1), "facts": interval(0.7), "facts_margin": interval(0.2)}
    more |= {"facts_quoted": interval(0.8), "facts_quoted_margin": interval(0.3)}
    kinds = {"facts_kinds": {"sum": {"native": 0.5, "memory": 0.25}}}
    certificate = certified(plan(300, 0.8), plan(300, 0.9, 16, 48, **more, **kinds))
    default = certificate_tables.default_table(certificate, 300)
    assert "| **memory, as served by default** | 31% | 0.900 (0.850 … 0.950) | 0.800" in default
    assert "only the matching passages read | 31% | 0.800" in default
    assert "**margin over the best control** | 31% | 0.100" in default
    assert "| 300 | 16 | 48 | 31% |" in certificate_tables.plans_table(certificate)
    assert "quotes 0.800" in certificate_tables.plans_table(certificate)
    assert "| sum | 0.50 | 0.25 |" in certificate_tables.kinds_table(certificate.plans[1])
