"""The examples of README and docs that talk to a server, against one that runs as they start it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_blocks import MEMORY, SERVER, Block, blocks, commands
from harness import CLI, Server, serving

pytestmark = pytest.mark.engine

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
"""The demo's Gemma-3 has no chat template of its own."""
NAMED = ('"models/gemma3-270m"', '"gemma3-270m"')
"""What the examples call the model in a request."""
SERVES = "awareness serve "


@pytest.fixture(scope="module")
def home(
    smollm2: Path, gemma3: Path, wmatrix: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A home with the demo's models and map, and a store of its own."""
    path = tmp_path_factory.mktemp("docs") / "home"
    (path / "wmatrices").mkdir(parents=True)
    (path / "models").mkdir()
    (path / "wmatrices/smollm2-135m--gemma3-270m.wmatrix").symlink_to(wmatrix)
    for model in (smollm2, gemma3):
        (path / "models" / model.name).symlink_to(model)
    return path


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    """Started with the flags of the quickstart, from the home."""
    (words,) = (w for w in commands(quickstart().text) if w[:2] == ["awareness", "serve"])
    model, flags = home / words[2], words[3:]
    flags[flags.index("--wmatrix") + 1] = str(home / flags[flags.index("--wmatrix") + 1])
    template = home / "template.jinja"
    template.write_text(TEMPLATE)
    log = home.parent / "server.log"
    flags += ["--allow-capture", "--chat-template", str(template)]
    yield from serving(model, home / "store", log, *flags)


@pytest.fixture(scope="module")
def memory(server: Server) -> str:
    """The ID of a memory that the server itself has captured."""
    answer = server.client.completions.create(
        model="served",
        prompt="Anna Kowalski works as a gardener. She lives in Denver. " * 3,
        max_tokens=1,
        extra_body={"memory": {"capture": "a note"}},
    )
    return answer.memory["id"]


def quickstart() -> Block:
    (block,) = (b for b in blocks("sh", page="README.md") if b.live)
    return block


def here(text: str, server: Server) -> str:
    """An example's text with the running server's address and the name of its model."""
    for name in NAMED:
        text = text.replace(name, '"served"')
    return text.replace(SERVER, server.url.removeprefix("http://"))


def bash(script: str, home: Path, memory: str = "") -> str:
    """What a script prints; it ends at the first command that fails, an HTTP error is one."""
    folder = home.parent / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "awareness").write_text(f'#!/bin/sh\nexec {shlex.join(CLI)} "$@"\n')
    (folder / "awareness").chmod(0o755)
    environment = {**os.environ, "AWARENESS_HOME": str(home), "memory": memory}
    environment["PATH"] = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = "set -euo pipefail\n" + script.replace("curl -s ", "curl -sSf ")
    done = subprocess.run(
        ["bash", "-c", script], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_the_quickstart_works_as_written(server: Server, home: Path) -> None:
    """All of it but what is done here: the environment, the server's start and its end."""
    left_out = (". .venv/bin/activate; ", "kill %1\n")
    script = quickstart().text
    assert all(part in script for part in left_out)
    for part in left_out:
        script = script.replace(part, "")
    lines = [line for line in script.splitlines() if not line.startswith(SERVES)]
    assert len(lines) == len(script.splitlines()) - 1
    printed = bash(here("\n".join(lines), server), home)
    assert "certified" in printed
    answer = json.loads(printed.splitlines()[-1])
    assert answer["memory"]["plan"] == "load"
    assert answer["memory"]["loaded_tokens"] > 0
    assert answer["choices"][0]["text"].strip()


@pytest.mark.parametrize(
    "block", [b for b in blocks("sh") if b.live and b.page != "README.md"], ids=str
)
def test_shell_examples(block: Block, server: Server, home: Path, memory: str) -> None:
    assert bash(here(block.text, server), home, memory).strip()


@pytest.mark.parametrize("block", [b for b in blocks("python") if b.live], ids=str)
def test_python_examples(
    block: Block, server: Server, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = here(block.text, server).replace(MEMORY, memory)
    exec(compile(code, str(block), "exec"), {"__name__": "docs"})
    assert memory in capsys.readouterr().out


def test_the_response_is_as_described(server: Server, memory: str) -> None:
    (described,) = (json.loads(b.text)["memory"] for b in blocks("json") if '"plan"' in b.text)
    answer = server.client.completions.create(
        model="served", prompt=" It", max_tokens=2, extra_body={"memory_ids": [memory]}
    )
    assert set(answer.memory) == set(described)
