"""The command line: light to load, one JSON document, and every mistake named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from awareness_vllm.cli.eval import read_cases
from awareness_vllm.cli.main import SUBCOMMANDS, main, printable
from awareness_vllm.errors import CONTROL, BadInput, escaped
from awareness_vllm.evaluate import conditions, evaluate
from awareness_vllm.evaluate.evaluate import CaseFigures, TextFigures
from awareness_vllm.packages.file import Package, publish
from awareness_vllm.serving import plugin as register_module
from awareness_vllm.serving.config import WORKER_EXTENSION
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

CASE = {"context": "c", "question": "q", "answer": "a"}


@pytest.fixture(scope="module")
def published(
    make_package: Callable[..., Package], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return publish(make_package(), tmp_path_factory.mktemp("store"))


def document(argv: list[str], capfd: pytest.CaptureFixture[str], status: int = 0) -> Any:
    """Run a subcommand with --json; its stdout must be one JSON document."""
    assert main([*argv, "--json"]) == status
    return json.loads(capfd.readouterr().out)


@pytest.mark.slow
def test_help_loads_neither_torch_nor_vllm() -> None:
    script = """
import sys
from awareness_vllm.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
assert not {"torch", "vllm", "transformers", "numpy"} & set(sys.modules), sorted(sys.modules)
"""
    for argv in ([], *([name] for name in SUBCOMMANDS)):
        done = subprocess.run(
            [sys.executable, "-c", script, *argv, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "usage: awareness" in done.stdout


def test_list_inspect_and_verify(
    published: Path, wmatrix: WMatrix, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(published.parent)]
    listed = document(["list", *store], capfd)
    assert [row["id"] for row in listed["memories"]] == [published.stem]
    inspected = document(["inspect", published.stem, *store], capfd)
    assert (inspected["kind"], inspected["id"]) == ("memory", published.stem)
    found = document(["verify", published.stem, *store], capfd)
    assert (found["ok"], found["id"]) == (True, published.stem)
    wmatrix.save(tmp_path / "a.wmatrix")
    inspected = document(["inspect", str(tmp_path / "a.wmatrix")], capfd)
    assert (inspected["kind"], inspected["certified"]) == ("wmatrix", False)
    assert document(["verify", str(tmp_path / "a.wmatrix")], capfd)["ok"] is True
    small = tmp_path / "small.wmatrix"
    made = document(["quantize", str(tmp_path / "a.wmatrix"), "--out", str(small)], capfd)
    assert made["bytes"] == small.stat().st_size
    assert document(["inspect", str(small)], capfd)["quantization"] == "int8"
    for argv in (["list", *store], ["inspect", published.stem, *store]):
        assert main(argv) == 0
    assert published.stem in capfd.readouterr().out


@pytest.mark.parametrize(
    ("argv", "kind", "field", "says"),
    [
        (["inspect", "../etc/passwd"], "InvalidMemoryId", "found", "../etc/passwd"),
        (["verify", "mem_" + "0" * 32], "MemoryNotFound", "remedy", "awareness list"),
        (["verify", "ALTERED"], "PackageCorrupt", "expected", "sha256"),
        (["capture", "--model", "/no/such", "--text", __file__], "UnsupportedModel", "found", ""),
        (["eval", "--source", "a", "--target", "b", "--cases", "/no"], "BadInput", "expected", "U"),
        (["serve", "m", "--wmatrix", "/no.wmatrix"], "BadInput", "found", "/no.wmatrix"),
        (["serve", "m", "--model=x"], "BadInput", "found", "--model=x"),
    ],
)
def test_an_error_is_one_json_document(
    published: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    argv: list[str],
    kind: str,
    field: str,
    says: str,
) -> None:
    if argv[-1] == "ALTERED":
        altered = bytearray(published.read_bytes())
        altered[-1] ^= 1
        argv = [argv[0], str(tmp_path / published.name)]
        (tmp_path / published.name).write_bytes(altered)
    if argv[0] in ("inspect", "verify", "capture"):
        argv = [*argv, "--store", str(tmp_path)]
    assert main([*argv, "--json"]) == 1
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert set(error) == {"type", "message", "found", "expected", "remedy"}
    assert error["type"] == kind
    assert says in error[field]
    assert error["message"] in err


FORGED = "red\x1b[31m\nmem_forged  9 tokens\u202e\x9b"


@pytest.fixture
def forged(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    """A store with a package whose names would rewrite a terminal."""
    package = make_package(text="forged")
    named = package.manifest.geometry.model_copy(update={"name": FORGED})
    manifest = package.manifest.model_copy(update={"geometry": named})
    return publish(replace(package, manifest=manifest), tmp_path / "store")


def test_names_from_files_are_printed_with_escapes(
    forged: Path, wmatrix: WMatrix, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = wmatrix.manifest.source.model_copy(update={"name": FORGED})
    manifest = wmatrix.manifest.model_copy(update={"source": source})
    replace(wmatrix, manifest=manifest).save(tmp_path / "a.wmatrix")
    store = ["--store", str(forged.parent)]
    for argv in (
        ["list", *store],
        ["inspect", forged.stem, *store],
        ["matrix", "--wmatrix", str(tmp_path / "a.wmatrix")],
        ["heads", str(tmp_path / "a.wmatrix")],
        ["inspect", str(tmp_path / "a.wmatrix")],
        ["check", forged.stem, "--target", FORGED, *store],
        ["inspect", FORGED],
    ):
        main(argv)  # shown, or refused for its names: neither obeys them
        printed = "".join(capfd.readouterr())
        assert "red" in printed or "control character" in printed, argv
        assert not CONTROL.search(printed.replace("\n", "")), argv
        assert "\nmem_forged" not in printed, argv


def test_strings_at_any_depth_are_escaped() -> None:
    assert printable({"a": [FORGED, {"b": (FORGED, 3)}], "c": "é 🙂 ▁"}) == {
        "a": [escaped(FORGED), {"b": [escaped(FORGED), 3]}],
        "c": "é 🙂 ▁",
    }
    assert not CONTROL.search(escaped(FORGED))
    assert "\n" not in str(BadInput("one", found="two\r\n three"))


@pytest.mark.parametrize("name", ["", "x" * 201, "one\nmem_forged", "\x1b[31m", "\u202e"])
def test_a_name_with_control_characters_is_refused(
    name: str, tiny_models: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words")
    argv = ["capture", "--model", str(tiny_models[0]), "--text", str(tmp_path / "text.txt")]
    argv += ["--store", str(tmp_path / "store"), f"--name={name}"]
    for engine in ("transformers", "vllm"):
        error = document([*argv, "--engine", engine], capfd, status=1)["error"]
        assert (error["type"], "control characters" in error["expected"]) == ("BadInput", True)
    assert not (tmp_path / "store").exists()


def test_odd_entries_of_a_store_are_rows_of_their_own(
    published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(published, tmp_path)
    names = [f"mem_{digit * 32}.safetensors" for digit in "abcd"]
    (tmp_path / names[0]).symlink_to(tmp_path / "nowhere")
    (tmp_path / names[1]).symlink_to(tmp_path / names[1])
    (tmp_path / names[2]).mkdir()
    (tmp_path / names[3]).write_bytes(b"no package")
    rows = {
        row["id"]: row for row in document(["list", "--store", str(tmp_path)], capfd)["memories"]
    }
    assert len(rows) == 5
    assert rows.pop(published.stem)["error"] is None
    assert all(row["error"] for row in rows.values())
    assert main(["list", "--store", str(tmp_path)]) == 0
    assert "5 memories" in capfd.readouterr().out


def test_a_fault_of_ours_is_one_json_document_too(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("awareness_vllm.cli.list.run", lambda args: {}["lost"])
    assert main(["list", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["error"]["type"] == "KeyError"
    assert "Traceback" in err


def test_a_reader_that_goes_away_is_no_fault(published: Path) -> None:
    command = [sys.executable, "-m", "awareness_vllm.cli.main", "list", "--store"]
    with subprocess.Popen(
        [*command, str(published.parent)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1


def test_what_an_error_does_not_say_is_null(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c").write_text(json.dumps(CASE | {"answer": ""}))
    argv = ["eval", "--source", "a", "--target", "b", "--cases", str(tmp_path / "c")]
    error = document(argv, capfd, status=1)["error"]
    assert error["found"] is None
    assert error["remedy"] is None


def test_what_libraries_print_stays_off_stdout() -> None:
    script = """
import os, subprocess, sys
from awareness_vllm.cli import list as list_, main

def noisy(args):
    print("noise from Python")
    os.write(1, b"noise from C\\n")
    subprocess.run(["echo", "noise from a child"], check=True)
    return {"n": 1}

list_.run = noisy
sys.exit(main.main(["list", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"n": 1}
    assert done.stderr.count("noise") == 3


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "serve"])
def test_unknown_flags_are_refused(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    needed = {
        "ask": ["x", "q", "--target", "t"],
        "capture": ["--model", "m", "--text", "t"],
        "export": ["x", "--latent", "w"],
        "fit": ["--source", "a", "--target", "b", "--anchors", "x", "--out", "o"],
        "quantize": ["w", "--out", "o"],
        "eval": ["--source", "a", "--target", "b", "--texts", "x"],
        "certify": ["w", "--source", "a", "--target", "b", "--texts", "x", "--cases", "y"],
        "path": ["--from", "a", "--to", "b"],
        "heads": ["w"],
        "check": ["x", "--target", "m"],
        "matrix": [],
        "catalogue": ["--html", "x"],
        "list": [],
        "inspect": ["x"],
        "verify": ["x"],
        "keygen": ["x"],
        "sign": ["x", "--key", "k"],
        "push": ["x", "y"],
        "pull": ["x"],
        "search": [],
        "show": ["x"],
        "gc": [],
        "align-on-demand": ["--source", "a", "--target", "b"],
        "doctor": [],
    }
    with pytest.raises(SystemExit) as end:
        main([name, *needed[name], "--bogus"])
    assert end.value.code == 2
    assert "--bogus" in capfd.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"context": "c", "question": "q"}',
        '{"context": "c", "question": "q", "answer": ""}',
        '{"context": "c", "question": "q", "answer": 3}',
        '["context", "question", "answer"]',
        '"context"',
        "3",
        "null",
    ],
)
def test_a_bad_case_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_text(f"{json.dumps(CASE)}\n\n{line}\n")
    with pytest.raises(BadInput, match="line 3"):
        read_cases(tmp_path / "c.jsonl")


def test_cases_are_read_line_by_line(tmp_path: Path) -> None:
    strange = {"context": "one\u2028two\u0085\x0b", "question": "q\n", "answer": " a"}
    known = CASE | {"kind": "k"}
    lines = (json.dumps(known | {"more": 1}), "", json.dumps(strange, ensure_ascii=False))
    (tmp_path / "c.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_cases(tmp_path / "c.jsonl") == [known, strange]


@pytest.mark.parametrize("what", ["texts", "cases"])
def test_eval_prints_each_condition(
    what: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    figures = np.ones((2, 3 if what == "texts" else 2))
    shares = {"native": 0.0, "memory": 0.25, "none": 1.0, "memory_tail_16": 0.125}
    measured = {name: figures + share for name, share in shares.items()}
    texts, cases = TextFigures(["a", "b"], measured), CaseFigures(measured, ["k"] * 2, [0] * 2)
    monkeypatch.setattr(conditions, "EvalHarness", lambda *given: None)
    monkeypatch.setattr(evaluate, "evaluate_texts", lambda *args, **given: texts)
    monkeypatch.setattr(evaluate, "evaluate_cases", lambda *args, **given: cases)
    (tmp_path / "texts.txt").write_text("words " * 100)
    (tmp_path / "cases.jsonl").write_text(json.dumps(CASE))
    path = tmp_path / ("texts.txt" if what == "texts" else "cases.jsonl")
    assert main(["eval", "--source", "a", "--target", "b", f"--{what}", str(path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == list(shares)
    assert lines[-1] == "n = 2"
    assert ("0.750" in lines[4]) == (what == "texts")


def test_serve_becomes_vllms_server(
    wmatrix: WMatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    became: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda *call: became.append(call))
    monkeypatch.setattr(register_module, "vllm_version", lambda: "0.32.0")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    for name in ("a", "b"):
        wmatrix.save(tmp_path / f"{name}.wmatrix")
    argv = ["serve", "some/model", "--port", "8000", "--store", str(tmp_path / "store")]
    argv += ["--wmatrix", str(tmp_path / "a.wmatrix"), "--wmatrix", str(tmp_path / "b.wmatrix")]
    assert main([*argv, "--max-model-len=2048", "--enforce-eager"]) == 0
    ((file, command, environ),) = became
    assert file == command[0] == sys.executable
    assert command[1:5] == [
        "-m",
        "awareness_vllm.serving.server",
        "some/model",
        "--kv-transfer-config",
    ]
    transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "AwarenessConnector"
    extra = transfer["kv_connector_extra_config"]
    assert extra["store"] == str(tmp_path / "store")
    assert extra["wmatrices"] == [str(tmp_path / f"{name}.wmatrix") for name in ("a", "b")]
    assert command[command.index("--worker-extension-cls") + 1] == WORKER_EXTENSION
    assert command[-4:] == ["--port", "8000", "--max-model-len=2048", "--enforce-eager"]
    assert environ["VLLM_PLUGINS"] == "awareness,other"
    assert "--port 8000" in capfd.readouterr().out


def test_serve_prints_its_command_before_it_becomes_the_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    duplicated: list[tuple[int, int]] = []
    real = os.dup2

    def dup2(one: int, other: int, inheritable: bool = True) -> int:
        duplicated.append((one, other))
        return real(one, other, inheritable)

    kept = os.dup(1)
    monkeypatch.setattr(os, "execvpe", lambda *call: os.write(1, b"the server's log\n"))
    monkeypatch.setattr(os, "dup2", dup2)
    monkeypatch.setattr(register_module, "vllm_version", lambda: "0.32.0")
    try:
        assert main(["serve", "m", "--store", str(tmp_path), "--json"]) == 0
    finally:
        real(kept, 1)
        os.close(kept)
    out, err = capfd.readouterr()
    assert json.loads(out)["argv"][3] == "m"
    assert "the server's log" in err
    assert duplicated[-1] == (2, 1)


def test_a_full_disk_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["matrix", "--wmatrix", str(tmp_path), "--html", "/dev/full"]
    assert document(argv, capfd, 1)["error"]["type"] == "StorageFull"
    assert Path("/dev/full").is_char_device()
