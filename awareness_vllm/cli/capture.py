"""`awareness capture`: the KV cache of a text as a memory package in a store."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "capture a text's KV cache as a memory package"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="library that computes it: transformers (fast) or vllm (exact in a vLLM server)",
    )
    parser.add_argument(
        "--without-text",
        action="store_true",
        help="leave out text and token ids; needs a W-Matrix fitted without text",
    )
    parser.add_argument("--store", type=Path, help="folder (default: $AWARENESS_HOME/store)")
    parser.add_argument("--name", help="a name for the manifest")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.files import default_store, read_text_file
    from awareness_vllm.packages.file import publish, without_text

    if args.engine == "vllm":
        from awareness_vllm.serving.offline_capture import capture
    else:
        from awareness_vllm.packages.capture import capture
    package = capture(args.model, read_text_file(args.text), name=args.name)
    if args.without_text:
        package = without_text(package)
    path = publish(package, args.store or default_store())
    return {
        "id": path.stem,
        "path": str(path),
        "tokens": package.manifest.tokens,
        "bytes": path.stat().st_size,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['id']}  {result['tokens']} tokens, {result['bytes']} bytes, {result['path']}")
