"""The shell commands and Python blocks of README, CONTRIBUTING and docs, run as they are written:
in a home as `make models anchors` leaves it, with tiny models under the names of the real ones.

Those that talk to a server run in tests/engine/test_docs.py.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from awareness_demo.facts import fact_cases, fact_texts
from doc_blocks import MEMORY, ROOT, Block, blocks, commands
from tokenizers import Tokenizer

from awareness_vllm.anchors.corpus import Document, digest
from awareness_vllm.anchors.corpus import load as load_texts
from awareness_vllm.cli.main import main
from awareness_vllm.evaluate import monitor
from awareness_vllm.fit import gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.serving import doctor, load_benchmark
from awareness_vllm.wmatrix.file import load

pytestmark = [pytest.mark.unit, pytest.mark.slow]

PAIR = "smollm2-135m--gemma3-270m"
PARSED = {
    "README.md": "the quickstart runs in tests/engine/test_docs.py; `make` targets exist",
    "CONTRIBUTING.md": "`make` targets exist",
    "docs/results.md": "measurements, minutes to hours each",
    "docs/serving.md": "servers: composed below, run in tests/engine/test_docs.py",
}
"""Pages whose shell commands are only parsed here, and why."""
NOT_RUN = {
    "--engine vllm": "starts vLLM: tests/engine/harness.py's `captured` does so",
    "awareness certify": "tiny models gain nothing by reading; test_fidelity.py runs it",
    "awareness eval": "the same",
    "awareness align-on-demand": "uses up its budget of minutes; test_on_demand.py runs it",
}
"""Commands of the other pages that are only parsed, and why."""
SMALLER = {"fit": ["--rank", "4", "--tokens", "1000", "--calibration", "2"]}
"""Last words that make a command quick."""
IN_PYTHON = {"num_anchors=60_000": "num_anchors=1000", "rank=1024": "rank=4, calibration=2"}
"""What makes a Python block quick."""


def test_what_is_only_parsed_is_there() -> None:
    assert all(blocks("sh", page=page) for page in PARSED)
    others = [w for b in blocks("sh") if b.page not in PARSED for w in commands(b.text)]
    assert all(any(part in " ".join(words) for words in others) for part in NOT_RUN)


def write_texts(folder: Path, texts: list[str]) -> None:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    byte_level_tokenizer: Tokenizer,
    byte_fallback_tokenizer: Tokenizer,
    anchors: list[Document],
) -> Path:
    """Models, texts, a store with one memory, and a certified W-Matrix."""
    home = tmp_path_factory.mktemp("demo")
    models = (
        make_model(home / "models/smollm2-135m", byte_level_tokenizer, 16, 4, 2),
        make_model(home / "models/gemma3-270m", byte_fallback_tokenizer, 24, 2, 3),
    )
    texts = [document.text for document in anchors]
    write_texts(home / "anchors/general_knowledge", texts[:5])
    write_texts(home / "anchors/code", texts[5:])
    for seed, name in enumerate(("crawl", "debian-history", "wordnet"), 1):
        write_texts(home / "held-out" / name, fact_texts(2, seed, characters=3000))
    (home / "held-out/facts").mkdir()
    cases = "\n".join(map(json.dumps, fact_cases(3, seed=0)))
    (home / "held-out/facts/cases.jsonl").write_text(cases)
    (home / "report.txt").write_text(texts[0])
    entry = {"public_key": "alice.pub", "roles": ["package", "wmatrix", "certificate"]}
    (home / "trust.json").write_text(json.dumps({"keys": {"alice": entry}}))
    publish(capture(models[0], texts[1]), home / "store")
    certificate = load(ROOT / "tests/data/v0.1/pair.wmatrix").manifest.certificate
    assert certificate is not None
    certificate["protocol"]["texts"] = digest(load_texts([home / "held-out/crawl"]))
    config = FitConfig(tokens=1000, rank=4, predecessors=0, calibration=0, held_out=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        learned = fit(*models, anchors, config, progress=False)
    manifest = learned.manifest.model_copy(update={"certificate": certificate})
    for path in (home / f"wmatrices/{PAIR}.wmatrix", home / "pair.wmatrix"):
        replace(learned, manifest=manifest).save(path)
    return home


@pytest.fixture
def memory(demo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ID of the home's memory, while the test is in that home."""
    monkeypatch.setenv("AWARENESS_HOME", str(demo))
    monkeypatch.chdir(demo)
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    before = set(demo.rglob("*"))
    yield next(iter(sorted((demo / "store").glob("mem_*")))).stem
    for path in set(demo.rglob("*")) - before:
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    "block", [b for b in blocks("sh") if b.page not in PARSED and not b.live], ids=str
)
def test_commands_run(block: Block, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_measurement_of_speed(monkeypatch)
    for words in commands(block.text):
        assert words[0] == "awareness"
        if any(part in " ".join(words) for part in NOT_RUN):
            continue
        argv = [memory if word == "$memory" else word for word in words[1:]]
        assert main([*argv, *SMALLER.get(words[1], [])]) == 0, words


def without_a_measurement_of_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`awareness doctor` would take seconds, and find that this home has no plugin installed."""
    monkeypatch.setattr(load_benchmark, "calibrated", lambda again: None)
    monkeypatch.setattr(doctor, "speed", lambda calibration: doctor.Check(
        name="speed", status="ok", found="not measured"
    ))  # fmt: skip


class StandIn:
    """In the place of vLLM's `LLM`; tests/engine/run_families.py has a real one."""

    llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))

    def __init__(self, model: str, **engine_args: Any) -> None:
        assert engine_args["kv_transfer_config"]["kv_connector"] == "AwarenessConnector"

    def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[str]:
        assert method.startswith("awareness")
        return ["no cache to read back"]

    def generate(self, prompt: dict[str, Any], params: Any) -> None:
        assert prompt["prompt_token_ids"]
        assert params.extra_args["kv_transfer_params"]["awareness"]["parts"]


@pytest.mark.parametrize("block", [b for b in blocks("python") if not b.live], ids=str)
def test_python_runs(
    block: Block,
    memory: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = block.text.replace(MEMORY, memory)
    for long, short in IN_PYTHON.items():
        code = code.replace(long, short)
    # Tiny models gain nothing by reading, so nothing could be measured.
    interval = {"mean": 0.9, "ci_low": 0.8, "ci_high": 1.0}
    figures = SimpleNamespace(retention=lambda: interval)
    monkeypatch.setattr(monitor, "evaluate_texts", lambda *args, **given: figures)
    if "import LLM" in code:
        monkeypatch.setattr(importlib.import_module("vllm"), "LLM", StandIn)
    exec(compile(code, str(block), "exec"), {"__name__": "docs"})
    assert "print(" not in code or capsys.readouterr().out.strip()
