"""How the command line is parsed: arguments among options, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from awareness_vllm.cli.main import main, parser

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("push A B --store S REF", {"what": ["A", "B"], "registry": "REF", "store": Path("S")}),
        ("push A --license MIT B --store S REF", {"what": ["A", "B"], "registry": "REF"}),
        ("push --tag t A --tag u REF", {"what": ["A"], "registry": "REF", "tag": ["t", "u"]}),
        ("pull A --store S B", {"what": ["A", "B"], "store": Path("S")}),
        ("pull A -- B --store", {"what": ["A", "B", "--store"], "store": None}),
        ("search the --limit 3 words", {"text": ["the", "words"], "limit": 3}),
        ("search --limit 3", {"text": [], "limit": 3}),
        ("ask --target T A --max-tokens 3 why?", {"what": "A", "question": "why?"}),
        ("check --target T A", {"memory": "A", "target": "T"}),
        ("check --target T", {"memory": None, "target": "T"}),
        ("serve M --max-model-len 9 --tail 3", {"model": "M", "tail": 3}),
    ],
)
def test_arguments_may_stand_among_options(argv: str, expected: dict[str, Any]) -> None:
    args, rest = parser().parse_known_args(argv.split())
    assert {name: getattr(args, name) for name in expected} == expected
    assert rest == (["--max-model-len", "9"] if args.subcommand == "serve" else [])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("push A --store S", "required: REF"),
        ("push A REF --bogus", "unrecognized arguments: --bogus"),
        ("check A B --target T", "unrecognized arguments: B"),
        ("check A", "required: --target"),
        ("eval --source S --target T", "one of the arguments --texts --cases is required"),
    ],
)
def test_what_a_command_lacks_is_named(
    argv: str, expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv.split())
    error = capfd.readouterr().err
    assert expected in error
    assert f"usage: awareness {argv.split()[0]} [-h]" in error or "usage: awareness [-h]" in error
