"""`awareness eval`: measure a W-Matrix by the five-arm protocol."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from awareness_vllm.cli.options import add_device

HELP = "measure retention (--texts) or fact recall (--cases) in five arms"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "wmatrix",
        nargs="?",
        type=Path,
        metavar="FILE.wmatrix",
        help="not needed where source and target are the same model",
    )
    parser.add_argument("--source", required=True, help="folder of the source model")
    parser.add_argument("--target", required=True, help="folder of the target model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--texts", nargs="+", type=Path, metavar="PATH", help="measure retention")
    what.add_argument("--cases", type=Path, metavar="FILE.jsonl", help="measure fact recall")
    parser.add_argument("--context", type=int, default=300, help="target tokens of memory")
    parser.add_argument("--continuation", type=int, default=60, help="tokens scored after it")
    parser.add_argument(
        "--join", action="store_true", help="join successive short texts of a folder"
    )
    parser.add_argument(
        "--tails",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="measure also with the memory's last N tokens read natively",
    )
    parser.add_argument(
        "--rereads",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="measure also with up to N tokens re-read in place where the question points",
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="measure also what the same operations buy without a memory",
    )
    add_device(parser)
    parser.add_argument("--limit", type=int, help="number of texts or cases at most")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.evaluate.arms import PlanShape
    from awareness_vllm.evaluate.conditions import EvalHarness
    from awareness_vllm.evaluate.evaluate import evaluate_cases, evaluate_texts, join_documents
    from awareness_vllm.wmatrix.certificate import CONTROLS
    from awareness_vllm.wmatrix.file import load as load_wmatrix

    cases = read_cases(args.cases) if args.cases else None
    harness = EvalHarness(
        args.source, args.target, load_wmatrix(args.wmatrix) if args.wmatrix else None, args.device
    )
    plans: dict[str, Any] = {
        "shapes": [PlanShape(t, r) for t in (0, *args.tails) for r in (0, *args.rereads)],
        "controls": CONTROLS if args.controls else (),
    }
    if cases is not None:
        return evaluate_cases(harness, cases, limit=args.limit, **plans).summary()
    from awareness_vllm.anchors.corpus import load

    texts = load(args.texts)
    return evaluate_texts(
        harness,
        join_documents(texts, args.context + args.continuation) if args.join else texts,
        context=args.context,
        continuation=args.continuation,
        limit=args.limit,
        **plans,
    ).summary()


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases of a file: lines of `{"context", "question", "answer"}`, optionally `"kind"` and
    `"tokens"`, the context's length, about.

    Raises:
        BadInput: an unreadable file, or a line that is not a case.
    """
    from awareness_vllm.errors import BadInput
    from awareness_vllm.files import read_text_file

    cases = []
    # Not splitlines(): a JSON text may hold U+2028 and other ends of lines as they are.
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            case = json.loads(line)
            texts = {field: case[field] for field in ("context", "question", "answer")}
            texts |= {"kind": case["kind"]} if "kind" in case else {}
            tokens = {"tokens": case["tokens"]} if "tokens" in case else {}
            cases.append(texts | tokens)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(
                f"{path}, line {number} is not a case",
                found=repr(error),
                expected='{"context": …, "question": …, "answer": …}',
            ) from error
        if not all(isinstance(text, str) and text for text in texts.values()):
            raise BadInput(f"{path}, line {number} has a field that is not a non-empty text")
        if not all(type(count) is int and count > 0 for count in tokens.values()):
            raise BadInput(f"{path}, line {number}: tokens is not a positive number")
    return cases


def show(result: dict[str, Any]) -> None:
    for arm, figures in result["conditions"].items():
        print(f"{arm:32}" + "".join(f"{name} {value:8.4f}   " for name, value in figures.items()))
    shares = {"retention": result["retention"]} if "retention" in result else {}
    for name, r in {**shares, **result["plans"]}.items():
        print(f"{name:32}{r['mean']:.3f} (95 % CI {r['ci_low']:.3f} … {r['ci_high']:.3f})")
    print(f"n = {result['n']}")
