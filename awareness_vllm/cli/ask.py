"""`awareness ask`: one question about a memory, answered here, without a server."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from awareness_vllm.cli.options import add_what, add_wmatrices
from awareness_vllm.passages import BUDGET

HELP = "answer one question from a memory, without a server"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_what(parser)
    parser.add_argument("question")
    parser.add_argument("--target", required=True, help="folder of the model that answers")
    add_wmatrices(parser)
    parser.add_argument(
        "--quote",
        type=int,
        default=BUDGET,
        metavar="TOKENS",
        help="tokens of the memory at most, where the question points, that are quoted before the "
        f"question (default: {BUDGET}); 0 for none",
    )
    parser.add_argument(
        "--reread",
        type=int,
        default=BUDGET,
        metavar="TOKENS",
        help="where none are quoted, tokens at most that the target reads itself in place "
        f"(default: {BUDGET}); 0 for none",
    )
    parser.add_argument("--max-tokens", type=int, default=64, help="of the answer (default: 64)")
    parser.add_argument(
        "--raw", action="store_true", help="the question is the prompt, as it is: no chat template"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.aligners.answer import OfflineTarget
    from awareness_vllm.errors import BadInput
    from awareness_vllm.packages.file import verify
    from awareness_vllm.packages.store import locate

    if min(args.reread, args.quote) < 0 or args.max_tokens < 1:
        raise BadInput(
            "no such number of tokens",
            found=f"--quote {args.quote} --reread {args.reread} --max-tokens {args.max_tokens}",
            expected="--quote and --reread of 0 or more, --max-tokens of 1 or more",
        )
    path = locate(args.what, args.store)
    package = verify(path)
    memory = OfflineTarget(args.target, args.wmatrix).use(package, path.stem)
    answer = memory.ask(
        args.question,
        quoted=args.quote,
        reread=args.reread,
        max_tokens=args.max_tokens,
        raw=args.raw,
        stream=(lambda text: None) if args.json else write,
    )
    return {"memory": path.stem, **asdict(answer), "native_tokens": answer.native_tokens}


def write(text: str) -> None:
    """Print a piece of an answer at once, its control characters escaped but for line ends."""
    from awareness_vllm.errors import escaped

    sys.stdout.write("\n".join(map(escaped, text.split("\n"))))
    sys.stdout.flush()


def show(result: dict[str, Any]) -> None:
    tokens = result["memory_tokens"] + result["question_tokens"]
    print(f"\n\nmemory    {result['memory_tokens']} tokens, {result['basis']}", end="")
    print(f", map {result['standing']}" if result["standing"] else "")
    for passage in result["passages"]:
        where = f"characters {passage['begin']}–{passage['end']}, {passage['tokens']} tokens"
        way = "quoted" if passage["quoted"] else "re-read"
        print(f"{way:10}{where}: {passage['text'].strip()}")
    if result["note"]:
        print(f"read      nothing of it natively: {result['note']}")
    print(
        f"cost      {result['native_tokens']} of {tokens} tokens read natively; "
        f"{result['align_s']:.2f} s to align, once for the memory, "
        f"{result['answer_s']:.2f} s to the first token "
        f"(reading the text natively: about {result['native_s']:.2f} s)"
    )
