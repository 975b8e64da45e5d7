"""`awareness certify`: measure a W-Matrix and write the certificate into it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from awareness_vllm.cli.options import add_device

HELP = "measure a W-Matrix in five arms and write the certificate into it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("wmatrix", type=Path, metavar="FILE.wmatrix")
    parser.add_argument("--source", required=True, help="folder of the source model")
    parser.add_argument("--target", required=True, help="folder of the target model")
    parser.add_argument(
        "--texts", required=True, nargs="+", type=Path, metavar="PATH", help="files or folders"
    )
    parser.add_argument(
        "--cases", required=True, type=Path, metavar="FILE.jsonl", help="cases of fact recall"
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="number of texts, and of cases of each length, at most (default: 48 and 200)",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[],
        metavar="TOKENS",
        help="also measure memories of these lengths",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.anchors.corpus import load as load_texts
    from awareness_vllm.cli.eval import read_cases
    from awareness_vllm.evaluate.certify import certify
    from awareness_vllm.wmatrix.file import load

    texts, cases = load_texts(args.texts), read_cases(args.cases)
    certified = certify(
        load(args.wmatrix),
        args.source,
        args.target,
        texts,
        cases,
        limit=args.limit,
        lengths=args.lengths,
        device=args.device,
    )
    certified.save(args.wmatrix)
    assert certified.manifest.certificate is not None
    return {"path": str(args.wmatrix), "certificate": certified.manifest.certificate}


def show(result: dict[str, Any]) -> None:
    from awareness_vllm.cli.format import lines

    print("\n".join(lines(result["certificate"])))
