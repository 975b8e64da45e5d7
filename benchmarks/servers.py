"""Servers of benchmarks, with memories in their store, and ratios within one run."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from awareness_demo.anchors import held_out_dir, install
from awareness_demo.models import prepare
from awareness_demo.servers import AWARENESS, running

from awareness_vllm.anchors.corpus import load
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving.plugin import vllm_version

FLAGS = ["--enforce-eager", "--kv-cache-memory-bytes", "1G", "--max-model-len", "2048"]
ALIGNED = ["--editions", "never"]
"""Of servers whose aligned memories are measured: an edition would take their place."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n"
    "{{ message.content }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)
"""Gemma's chats: the demo's Gemma-3 has no template of its own."""
BOOTSTRAPS = 2000


def paired_ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Median of one / other by pairs, and its 95 % bootstrap interval."""
    pairs = np.array(one) / np.array(other)
    draws = np.random.default_rng(0).choice(pairs, (BOOTSTRAPS, len(pairs)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    interval = [round(float(low), 4), round(float(high), 4)]
    return {"ratio": round(float(np.median(pairs)), 4), "interval": interval}


def stop_on_terminate() -> None:
    """Let SIGTERM end this program by an exception, so that no server stays behind."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def demo() -> tuple[Path, Path]:
    """The model folders of SmolLM2 and Gemma-3; with the anchors, prepared if they are missing."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        install()
        models = prepare()
    return models["smollm2-135m"], models["gemma3-270m"]


def demo_map() -> Path:
    """The map between them that the demo made."""
    return wmatrices_dir() / "smollm2-135m--gemma3-270m.wmatrix"


def arguments(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of a benchmark of SmolLM2's memories on Gemma-3, with `source`, `target` and
    `wmatrix`; and the flags of its server, which has room for a memory beside its text."""
    parser.add_argument("--tokens", type=int, default=2000, help="of each memory, the target's")
    parser.add_argument("--wmatrix", type=Path, help="default: the demo's")
    args, flags = parser.parse_known_args()
    stop_on_terminate()
    args.wmatrix = args.wmatrix or demo_map()
    args.source, args.target = demo()
    return args, [*(flags or FLAGS[:-2]), "--max-model-len", str(max(4096, 2 * args.tokens))]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark of these `arguments` was run with."""
    run = {"tokens": args.tokens, "rounds": args.rounds, "wmatrix": args.wmatrix.name}
    return run | machine()


def machine() -> dict[str, Any]:
    """What figures were measured on, and with."""
    return {"hardware": hardware(), "versions": {**versions(), "vllm": vllm_version()}}


def smollm2() -> Path:
    """The model folder of SmolLM2, prepared if it is missing."""
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the figures
        return prepare()["smollm2-135m"]


def stretches(model: Path, lengths: Sequence[int]) -> list[str]:
    """Stretches of a held-out document one after the other, of so many tokens of a model each."""
    whole = "\n\n".join(d.text for d in load([held_out_dir() / "debian-history"]))
    spans, raw = tokenize(load_tokenizer(str(model)), whole).spans, whole.encode()
    cuts = [int(spans[at, 0]) for at in itertools.accumulate(lengths, initial=0)]
    return [raw[begin:end].decode(errors="ignore") for begin, end in itertools.pairwise(cuts)]


def capture_text(model: Path, text: str, store: Path) -> str:
    """The ID of a text's memory."""
    file = store / "text.txt"
    file.write_text(text)
    return written_id("capture", "--model", model, "--text", file, "--store", store)


def written_id(*command: object) -> str:
    """The ID of the memory that a command of `awareness` writes."""
    called = [*AWARENESS[:-1], *map(str, command), "--json"]
    done = subprocess.run(called, stdout=subprocess.PIPE, check=True)
    return str(json.loads(done.stdout)["id"])


@contextlib.contextmanager
def serving(
    source: Path,
    target: Path,
    wmatrix: Path,
    texts: Sequence[str],
    flags: Sequence[str],
    store: Path | None = None,
) -> Iterator[tuple[str, dict[str, str]]]:
    """A server of a target, with a source's memories of some texts in an empty store, by default
    one of its own; its URL, the texts by ID."""
    with tempfile.TemporaryDirectory() as scratch:
        store = store or Path(scratch) / "store"
        store.mkdir(exist_ok=True)
        contexts = {capture_text(source, text, store): text for text in texts}
        flags = [*flags, "--store", str(store), "--wmatrix", str(wmatrix)]
        with running(AWARENESS, target, flags, Path(scratch) / "log") as server:
            yield server.url, contexts


def served_texts(
    args: argparse.Namespace, flags: Sequence[str], count: int
) -> AbstractContextManager[tuple[str, dict[str, str]]]:
    """`serving` of some held-out texts by a benchmark's `arguments`."""
    texts = stretches(args.target, [args.tokens] * count)
    return serving(args.source, args.target, args.wmatrix, texts, flags)
