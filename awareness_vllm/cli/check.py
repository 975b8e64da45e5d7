"""`awareness check`: the report of a memory on a target, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

from awareness_vllm.cli.options import add_registry, add_trust, add_wmatrices
from awareness_vllm.compatibility.target import TargetConfig

if TYPE_CHECKING:
    from awareness_vllm.compatibility.report import CompatibilityReport
    from awareness_vllm.wmatrix.registry import Registry

HELP = "estimate what a target keeps of a memory, with risks and what would raise it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", nargs="?", metavar="ID|FILE|REF", help="a memory's ID or file")
    parser.add_argument("--source", metavar="MODEL", help="instead of a memory: its model")
    parser.add_argument("--tokens", type=int, help="instead of a memory: its length in tokens")
    parser.add_argument("--target", required=True, metavar="MODEL", help="folder or name")
    parser.add_argument("--store", type=Path, help="folder in which the ID is looked up")
    add_wmatrices(parser)
    add_registry(parser)
    add_trust(parser)
    parser.add_argument("--kind", help="kind of the text, as the certificate names kinds")
    parser.add_argument(
        "--measure", action="store_true", help="also measure the memory on its own last quarter"
    )
    served = parser.add_argument_group("settings of the target's server")
    for name, field in TargetConfig.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        served.add_argument(flag, type=argument_type(field.annotation), help=field.description)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")


def argument_type(annotation: Any) -> type:
    """The type of a field's option: float, int or str."""
    parts = get_args(annotation) or (annotation,)
    kinds = [get_args(part)[0] if get_origin(part) is Annotated else part for part in parts]
    return next((kind for kind in (float, int) if kind in kinds), str)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.memory_checker import MemoryCompatibilityChecker

    memory, registry = memory_of(args)
    checker = MemoryCompatibilityChecker(
        args.wmatrix, store=args.store, trust=args.trust, registry=registry
    )
    options = {name: getattr(args, name) for name in TargetConfig.model_fields}
    report = checker.check(
        memory,
        args.target,
        {name: value for name, value in options.items() if value is not None},
        kind=args.kind,
        measure=args.measure,
    )
    if args.html:
        write_page(args.html, report, checker.registry)
    return {**report.model_dump(mode="json"), "html": str(args.html) if args.html else None}


def memory_of(args: argparse.Namespace) -> tuple[Any, str | None]:
    """The memory, and where maps are looked for that are not here. What is not here itself is
    looked up in the registry, of which only the listing is read."""
    from awareness_vllm.cli.pull import located
    from awareness_vllm.errors import InvalidMemoryId, MemoryNotFound
    from awareness_vllm.marketplace.files import listing
    from awareness_vllm.oci.connect import open_repository
    from awareness_vllm.oci.reference import SCHEME
    from awareness_vllm.packages.store import locate

    if args.memory is None:
        # A memory that is known by its model and length alone.
        known = SimpleNamespace(id="a memory", source_model=args.source, token_count=args.tokens)
        return known, args.registry
    if args.registry is None and not args.memory.startswith(SCHEME):
        return args.memory, None
    try:
        return locate(args.memory, args.store), args.registry
    except (InvalidMemoryId, MemoryNotFound):
        reference = located(args.memory, args.registry)
    assert reference.name is not None
    where = reference.repository_only
    return listing(open_repository(where), reference.name), args.registry or str(where)


def write_page(path: Path, report: CompatibilityReport, registry: Registry) -> None:
    """The report, the matrix of all W-Matrices, and the heads of the one that it speaks of."""
    from awareness_vllm.compatibility.html.page import page
    from awareness_vllm.compatibility.matrix import of_registry
    from awareness_vllm.files import replace_text
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.heads import head_shares

    basis = report.basis
    entry = next((e for e in registry if basis and e.digest == basis.digest), None)
    heads = head_shares(load(entry.path)) if entry else None
    document = page(report=report, matrix=of_registry(registry), heads=heads)
    replace_text(path, document)


def show(result: dict[str, Any]) -> None:
    print(f"{result['memory']}: {result['source']} → {result['target']}, {result['tokens']} tokens")
    print("\n".join(lines(result)))
    for risk in result["risk_factors"]:
        print(f"  risk ({risk['impact']}): {risk['description']}")
    for action in result["actions"]:
        gain = "gain unknown" if action["gain"] is None else f"{action['gain']:+.3f}"
        print(f"  to raise it ({gain}, {action['basis']}): {action['description']}")
    if result["html"]:
        print(result["html"])


def lines(result: dict[str, Any]) -> list[str]:
    """The figures, each with its basis."""
    retention = figure(result["estimated_retention"])
    if result["ci_low"] is not None:
        retention += f" ({result['ci_low']:.3f} … {result['ci_high']:.3f})"
    facts, own, margin = result["facts"], result["on_itself"], result["margin"]
    signed = [f"{what} by {name}" for what, name in result["signed_by"].items() if name]
    return [
        f"{result['level'] or 'unknown'}: {result['recommendation']}",
        *([f"  signed                    {', '.join(signed)}"] if signed else []),
        f"  compatibility score       {figure(result['compatibility_score'])}",
        f"  estimated retention       {retention}{basis(result['basis'])}",
        *([f"  on its own last quarter   {interval(own)}"] if own else []),
        *([f"  above what its cost buys  {interval(margin)}"] if margin else []),
        f"  facts, share of native    {figure(facts['mean'] if facts else None)}",
        f"  head mapping quality      {figure(result['head_mapping_quality'])}"
        + basis(result["head_mapping_basis"]),
        f"  positional compatibility  {figure(result['positional_compatibility'])}"
        + basis(result["positional_basis"]),
        f"  memory on the target      {figure(result['target_memory_gb'], '.3g', ' GB')}"
        + basis(result["target_memory_basis"]),
        f"  load time                 {load_time(result)}{basis(result['load_time_basis'])}",
    ]


def load_time(result: dict[str, Any]) -> str:
    """Seconds by temperature, or of a cold load alone."""
    if not result["load_times_s"]:
        return figure(result["estimated_load_time_s"], ".3g", " s")
    return ", ".join(f"{name} {s:.3g} s" for name, s in result["load_times_s"].items())


def basis(origin: dict[str, Any] | None) -> str:
    """Where a figure comes from, in brackets."""
    return "" if origin is None else f"   [{origin['kind']}: {origin['source']}]"


def interval(measured: dict[str, float]) -> str:
    return f"{measured['mean']:.3f} ({measured['ci_low']:.3f} … {measured['ci_high']:.3f})"


def figure(value: float | None, how: str = ".3f", unit: str = "") -> str:
    return "unknown" if value is None else f"{value:{how}}{unit}"
