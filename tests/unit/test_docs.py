"""README, CONTRIBUTING and docs: every command parses or runs, every Python block runs, every link
leads somewhere. What needs a running server is in tests/engine/test_docs.py.

Commands and Python blocks run in a home as `make demo` leaves it, with tiny models under the names
of the real ones, so that they run as they are written.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doc_blocks import MEMORY, PAGES, ROOT, Block, blocks, commands, inline, name_of, prose
from tokenizers import Tokenizer

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.anchors.facts import fact_cases, fact_texts
from awareness_vllm.cli.main import main, parser
from awareness_vllm.fit import gather
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.geometry import Geometry, Positions
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.request import parse_memory_request
from awareness_vllm.serving.tenants import Tenants
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.file import load
from awareness_vllm.wmatrix.manifest import WMatrixManifest

pytestmark = pytest.mark.unit

PAIR = "smollm2-135m--gemma3-270m"
SHELL = frozenset({".", "cd", "cut", "echo", "grep", "kill", "sleep"})
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
}
"""Commands of the other pages that are only parsed, and why."""
SMALLER = {"fit": ["--rank", "4", "--tokens", "1000", "--calibration", "2"]}
"""Last words that make a command quick."""
IN_PYTHON = {"num_anchors=60_000": "num_anchors=1000", "rank=1024": "rank=4, calibration=2"}
"""What makes a Python block quick."""
VLLM_FLAGS = frozenset(
    {
        "--chat-template",
        "--help",
        "--kv-transfer-config",
        "--max-model-len",
        "--worker-extension-cls",
    }
)
"""Flags in prose that are vLLM's own."""
FILE = re.compile(r"(?:[\w.-]+/)+[\w-]+(?:\.(?:py|md|json|sh|png))?")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


# What is there


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {"sh", "python", "json", "text"}
    assert not [str(block) for block in blocks() if block.language not in kinds]
    begins = re.compile(r"^\s*(make|python|pip|curl|pytest) ", re.MULTILINE)
    assert not [str(block) for block in blocks("text") if begins.search(block.text)]


def test_what_is_only_parsed_is_there() -> None:
    assert all(blocks("sh", page=page) for page in PARSED)
    others = [w for b in blocks("sh") if b.page not in PARSED for w in commands(b.text)]
    assert all(any(part in " ".join(words) for words in others) for part in NOT_RUN)


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(prose(page)):
        if path.startswith("http"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor[1:] in anchors_of(target), path + anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_and_modules_exist(page: Path) -> None:
    folders = [ROOT, ROOT / "awareness_vllm", ROOT / "awareness_vllm/serving", page.parent]
    tops = {path.name for folder in folders for path in folder.iterdir()} - {"models", "anchors"}
    for code in inline(page):
        if FILE.fullmatch(code) and code.split("/")[0] in tops:
            found = [f / name for f in folders for name in (code, f"{code}.py")]
            assert any(path.exists() for path in found), code


# Commands


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def script_flags(path: Path) -> tuple[dict[str, bool], bool]:
    """A script's flags and whether each is required; and whether it takes others, too."""
    source = path.read_text()
    flags = {}
    for call in ast.walk(ast.parse(source)):
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"):
            continue
        required = any(k.arg == "required" and ast.literal_eval(k.value) for k in call.keywords)
        names = [a.value for a in call.args if isinstance(a, ast.Constant)]
        flags |= {name: required for name in names if str(name).startswith("--")}
    return flags, "parse_known_args" in source


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def flags_in(words: list[str]) -> list[str]:
    return [match[0] for word in words if (match := re.match(r"--[a-z][\w-]*", word))]


def check_command(words: list[str], *, whole: bool = True) -> None:
    """Whether a command is one that there is, with flags that it takes.

    Args:
        whole: whether it stands there with all that it needs, not as a mention.
    """
    if words[0] == "awareness":
        check_subcommand(words[1:], whole)
    elif words[0] == "make":
        assert set(words[1:]) <= targets(), words
    elif words[0] == "python" and words[1].endswith(".py"):
        check_script(words, whole)
    elif words[0] == "python":
        assert importlib.util.find_spec(words[2]), words
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/")), words
    else:
        assert words[0] in {*SHELL, "curl", "vllm"}, words


def check_subcommand(words: list[str], whole: bool) -> None:
    if whole:
        args, rest = parser().parse_known_args(words)
        assert args.subcommand == "serve" or not rest, rest
        return
    known = subparsers()
    if words == ["--help"]:
        return
    assert words[0] in known, words
    allowed = known[words[0]]._option_string_actions
    assert words[0] == "serve" or not set(flags_in(words)) - set(allowed), words


def check_script(words: list[str], whole: bool) -> None:
    flags, others = script_flags(ROOT / words[1])
    assert others or not set(flags_in(words)) - set(flags), words
    missing = {name for name, required in flags.items() if required} - set(flags_in(words))
    assert not (whole and missing), missing


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_parse(block: Block) -> None:
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_text_have_such_flags(page: Path) -> None:
    scripts = {f for path in (ROOT / "benchmarks").glob("*.py") for f in script_flags(path)[0]}
    known = {f for p in subparsers().values() for f in p._option_string_actions} | scripts
    for code in inline(page):
        words = code.replace("[", " ").replace("]", " ").split()
        if re.match(r"(awareness|make|python benchmarks/\S+\.py) ?", code) and len(words) > 1:
            check_command(words, whole=False)
        elif code.startswith("--"):
            assert not set(flags_in(words)) - known - VLLM_FLAGS, code


# A home as `make demo` leaves it, but tiny


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
    publish(capture(models[0], texts[1]), home / "store")
    certificate = load(ROOT / "tests/data/v0.1/pair.wmatrix").manifest.certificate
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


@pytest.mark.slow
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
    from awareness_vllm.serving import doctor, load_benchmark

    monkeypatch.setattr(load_benchmark, "calibrated", lambda again: None)
    monkeypatch.setattr(doctor, "speed", lambda calibration: doctor.Check(
        name="speed", status="ok", found="not measured"
    ))  # fmt: skip


# Python


class StandIn:
    """In the place of vLLM's `LLM`; tests/engine/run_families.py has a real one."""

    llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))

    def __init__(self, model: str, **engine_args: Any) -> None:
        assert engine_args["kv_transfer_config"]["kv_connector"] == "AwarenessConnector"

    def collective_rpc(self, method: str) -> None:
        assert method.startswith("awareness")

    def generate(self, prompt: dict[str, Any], params: Any) -> None:
        assert prompt["prompt_token_ids"]
        assert params.extra_args["kv_transfer_params"]["awareness"]["parts"]


@pytest.mark.slow
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
    if "import LLM" in code:
        monkeypatch.setattr(importlib.import_module("vllm"), "LLM", StandIn)
    exec(compile(code, str(block), "exec"), {"__name__": "docs"})
    assert "print(" not in code or capsys.readouterr().out.strip()


# Serving


def documents(block: Block) -> Iterator[Any]:
    """A block's JSON documents, one after another."""
    text, decoder = block.text.strip(), json.JSONDecoder()
    while text:
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:].strip()


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_what_a_server_takes_or_gives(block: Block, tmp_path: Path) -> None:
    for document in documents(block):
        if "plan" in document.get("memory", {}):
            continue  # a response: compared with a real one in tests/engine/test_docs.py
        if {"memory_ids", "memory"} & set(document):
            text = json.dumps(document, ensure_ascii=False)
            for i in range(text.count(MEMORY)):
                text = text.replace(MEMORY, f"mem_{i:032x}", 1)
            assert parse_memory_request(json.loads(text)) is not None
        else:
            (tmp_path / "tenants.json").write_text(json.dumps(document))
            assert set(Tenants.read(tmp_path / "tenants.json").stores(tmp_path)) == set(document)


def test_the_command_by_hand_is_the_one_that_serve_composes() -> None:
    (words,) = (w for b in blocks("sh") for w in commands(b.text) if w[0] == "vllm")
    transfer = json.loads(words[words.index("--kv-transfer-config") + 1])
    config = ServingConfig.parse(transfer["kv_connector_extra_config"])
    composed = transfer_config(config)
    assert {**transfer, "kv_connector_extra_config": composed["kv_connector_extra_config"]} == (
        composed
    )
    assert words[words.index("--worker-extension-cls") + 1] == WORKER_EXTENSION


def test_serves_flags_are_all_described() -> None:
    page = (ROOT / "docs/serving.md").read_text()
    flags = set(subparsers()["serve"]._option_string_actions) - {"-h", "--help", "--json"}
    assert {flag for flag in flags if f"`{flag} " not in page} == set()


# Formats


@pytest.mark.parametrize(
    ("heading", "models"),
    [
        ("## Memory package", [Manifest]),
        ("## W-Matrix", [WMatrixManifest]),
        ("### Certificate", [Certificate]),
        ("## Geometry", [Geometry]),
    ],
)
def test_every_field_of_a_manifest_is_described(heading: str, models: list[Any]) -> None:
    page = (ROOT / "docs/format.md").read_text()
    level = heading.split()[0]
    section = re.split(rf"^#{{2,{len(level)}}} ", page.split(f"{heading}\n")[1], flags=re.M)[0]
    table = section.split("| field | |" if "manifest" not in section else "field | |")[1]
    rows = re.findall(r"^\| (`[^|]+) \|", table.split("\n\n")[0], re.MULTILINE)
    fields = [name.strip("` ") for row in rows for name in row.split(",")]
    assert sorted(fields) == sorted(f for model in models for f in model.model_fields)


def test_every_field_of_positions_is_described() -> None:
    page = (ROOT / "docs/format.md").read_text()
    assert not [name for name in Positions.model_fields if f"`{name}`" not in page]


def test_shell_words_are_words() -> None:
    script = "a=$(awareness list | cut -f1)\nX=1 make 'one\ntwo' \\\n  three # four\n"
    assert list(commands(script)) == [
        ["awareness", "list"],
        ["cut", "-f1"],
        ["make", "one\ntwo", "three"],
    ]
    assert shlex.split("'one\ntwo'") == ["one\ntwo"]
