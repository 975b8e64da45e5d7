"""`awareness`: one file per subcommand; `--help` imports neither torch nor vllm."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from awareness_vllm.errors import AwarenessError, BadInput, StorageFull, escaped
from awareness_vllm.files import is_disk_full

SUBCOMMANDS = (
    *("ask", "capture", "export", "fit", "align-on-demand", "quantize", "eval", "certify"),
    *("path", "heads", "check", "matrix", "list", "inspect", "verify", "keygen", "sign"),
    *("push", "pull", "search", "show", "catalogue", "gc", "serve", "doctor"),
)


class Parser(argparse.ArgumentParser):
    """A parser whose arguments, if they are `intermixed`, may stand among its options, as those of
    git and docker."""

    intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        if not self.intermixed:
            return super().parse_known_args(args, namespace)
        self.intermixed = False  # this comes back here for the options, then for what is left
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.intermixed = True


def parser(names: Sequence[str] = SUBCOMMANDS) -> argparse.ArgumentParser:
    """The parser of subcommands, all of them by default.

    Each module has `HELP`, `add_arguments(parser)`, `run(args) -> result` and `show(result)`,
    which prints the result with control characters escaped;
    optionally `after(args, result)`, which runs once the result is printed, and `status(result)`,
    the exit status.
    """
    top = Parser(prog="awareness", description="Serve memories of one model with another.")
    subparsers = top.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name in names:
        module = importlib.import_module(f"awareness_vllm.cli.{name}".replace("-", "_"))
        sub = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, allow_abbrev=False
        )
        module.add_arguments(sub)
        sub.intermixed = name != "serve"  # whose unknown flags bring values, which are no arguments
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
        sub.set_defaults(module=module)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 1 after an error, which is printed on stderr
    and in the JSON document."""
    argv = sys.argv[1:] if argv is None else argv
    # The others' modules and arguments would take three quarters of a short command's time.
    top = parser(argv[:1]) if argv and argv[0] in SUBCOMMANDS else parser()
    args, rest = top.parse_known_args(argv)
    if rest and args.subcommand != "serve":
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    args.flags = rest
    try:
        with only_ours_on_stdout() if args.json else nullcontext():
            result = args.module.run(args)
    except Exception as error:
        return report(error, args.json)
    try:
        if args.json:
            print(json.dumps(result))
        else:
            args.module.show(printable(result))
        sys.stdout.flush()
    except BrokenPipeError:  # `awareness list | head`: nobody reads on, now and at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if hasattr(args.module, "after"):
        args.module.after(args, result)
    return args.module.status(result) if hasattr(args.module, "status") else 0


def report(caught: Exception, as_json: bool) -> int:
    """Print an error on stderr, and as the JSON document; the exit status.

    A fault of ours, which no error describes, has its traceback on stderr.
    """
    error = typed(caught)
    kind = type(caught if type(error) is AwarenessError else error).__name__
    print(f"awareness: {kind}: {error}", file=sys.stderr)
    if as_json:
        document: dict[str, str | None] = {"type": kind, "message": error.what}
        for name in ("found", "expected", "remedy"):
            value = getattr(error, name)
            document[name] = value if value is None else str(value)
        print(json.dumps({"error": document}))
    return 1


def printable(value: Any) -> Any:
    """A result with control characters escaped in all of its strings: names come from files."""
    match value:
        case str():
            return escaped(value)
        case dict():
            return {key: printable(item) for key, item in value.items()}
        case list() | tuple():
            return [printable(item) for item in value]
    return value


def typed(caught: Exception) -> AwarenessError:
    """An error that says what to do."""
    if isinstance(caught, AwarenessError):
        return caught
    if is_disk_full(caught):
        return StorageFull(
            "the disk is full",
            found=str(caught),
            expected="room for what is written",
            remedy="make some, by `awareness gc --limit-gib 0` if need be, and try again",
        )
    if isinstance(caught, OSError):
        return BadInput(
            "a file cannot be used",
            found=str(caught),
            expected="a path that can be read or written",
            remedy="check the path and its permissions",
        )
    traceback.print_exception(caught)
    return AwarenessError(
        "awareness failed",
        found=f"{type(caught).__name__}: {caught}",
        remedy="report it with the traceback on stderr",
    )


@contextmanager
def only_ours_on_stdout() -> Iterator[None]:
    """Send what libraries and their child processes print to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


if __name__ == "__main__":
    sys.exit(main())
