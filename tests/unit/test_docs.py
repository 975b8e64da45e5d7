"""README, CONTRIBUTING and docs: every command parses with its real parser, every link and file
leads somewhere, and what is said of requests and of file formats is what the code has.

The commands and Python blocks run in tests/unit/test_docs_run.py, and those that talk to a server
in tests/engine/test_docs.py.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import MEMORY, PAGES, ROOT, Block, blocks, commands, inline, name_of, prose

from awareness_vllm.cli import main
from awareness_vllm.models.geometry import Geometry, Positions
from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.serving.config import WORKER_EXTENSION, ServingConfig, transfer_config
from awareness_vllm.serving.request import parse_memory_request
from awareness_vllm.serving.tenants import Tenants
from awareness_vllm.trust.policy import TrustFile
from awareness_vllm.wmatrix.certificate import Certificate, Plan
from awareness_vllm.wmatrix.manifest import WMatrixManifest

pytestmark = pytest.mark.unit

SHELL = frozenset({".", "cd", "cut", "echo", "grep", "kill", "sleep"})
VLLM_FLAGS = {"--chat-template", "--help", "--kv-transfer-config", "--max-model-len"}
VLLM_FLAGS |= {"--api-key", "--worker-extension-cls", "--jit-monitor-mode", "--grpc", "--nnodes"}
VLLM_FLAGS |= {f"--{kind}-parallel-size" for kind in ("data", "pipeline", "tensor")}
VLLM_FLAGS |= {f"--{kind}-context-parallel-size" for kind in ("decode", "prefill")}
VLLM_FLAGS |= {
    "--prefix-cache-retention-interval",
    "--api-server-count",
    "--gpu-memory-utilization",
    "--kv-cache-dtype",
    "--kv-cache-dtype-skip-layers",
}
"""Flags in prose that are vLLM's own."""
FILE = re.compile(r"(?:[\w.-]+/)+[\w-]+(?:\.(?:py|md|json|sh|png))?")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


# What is there


def test_every_block_is_of_a_known_kind() -> None:
    kinds = {"sh", "python", "json", "text"}
    assert not [str(block) for block in blocks() if block.language not in kinds]
    begins = re.compile(r"^\s*(make|python|pip|curl|pytest) ", re.MULTILINE)
    assert not [str(block) for block in blocks("text") if begins.search(block.text)]


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


parser = cache(main.parser)


@cache
def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@cache
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
        elif "keys" in document:
            assert TrustFile.model_validate(document)
        else:
            (tmp_path / "tenants.json").write_text(json.dumps(document))
            digests = Tenants.read(tmp_path / "tenants.json").digests
            assert {name for _, name in digests} == set(document)


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
    assert {flag for flag in flags if not re.search(f"`{flag}[ `]", page)} == set()


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


def test_every_field_of_a_plan_is_described() -> None:
    page = (ROOT / "docs/format.md").read_text()
    rows = page.split("| field of a plan | |")[1].split("\n\n")[0]
    fields = re.findall(r"`([a-z0-9_]+)`", re.sub(r"^(\|[^|]+\|).*$", r"\1", rows, flags=re.M))
    assert sorted(fields) == sorted(Plan.model_fields)


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
