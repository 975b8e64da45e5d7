"""`awareness check`: what a memory would be on a target, before anything is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from awareness_vllm.cli.options import add_wmatrices

if TYPE_CHECKING:
    from awareness_vllm.compatibility.report import CompatibilityReport
    from awareness_vllm.wmatrix.registry import Registry

HELP = "say what a memory would be on a target, how sure that is, and what would raise it"
CONFIG = {
    "quantization": str,
    "kv_cache_dtype": str,
    "context_length": int,
    "num_gpus": int,
    "memory_gb": float,
    "block_size": int,
    "tail": int,
    "custom_fine_tune": str,
}
"""The fields of `TargetConfig`, each an option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("memory", nargs="?", metavar="ID|FILE", help="a memory, or its file")
    parser.add_argument("--source", metavar="MODEL", help="without a memory: whose it would be")
    parser.add_argument("--tokens", type=int, help="and how many tokens it would have")
    parser.add_argument("--target", required=True, metavar="MODEL", help="a folder, or a name")
    parser.add_argument("--store", type=Path, help="folder in which the ID is looked up")
    add_wmatrices(parser)
    parser.add_argument("--kind", help="the kind of its text, as the certificate names kinds")
    parser.add_argument(
        "--measure", action="store_true", help="measure the memory on its own last part, too"
    )
    served = parser.add_argument_group("how the target is served")
    for name, kind in CONFIG.items():
        served.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from awareness_vllm.compatibility.checker import MemoryCompatibilityChecker

    checker = MemoryCompatibilityChecker(args.wmatrix, store=args.store)
    report = checker.check(
        args.memory or listing(args),
        args.target,
        {name: given for name in CONFIG if (given := getattr(args, name)) is not None},
        kind=args.kind,
        measure=args.measure,
    )
    if args.html:
        write_page(args.html, report, checker.registry)
    return {**report.model_dump(mode="json"), "html": str(args.html) if args.html else None}


def listing(args: argparse.Namespace) -> SimpleNamespace:
    """A memory that is not at hand, known by its model and length."""
    return SimpleNamespace(id="a memory", source_model=args.source, token_count=args.tokens)


def write_page(path: Path, report: CompatibilityReport, registry: Registry) -> None:
    """The report, the matrix of all W-Matrices, and the heads of the one that it speaks of."""
    from awareness_vllm.compatibility.html.page import page
    from awareness_vllm.compatibility.matrix import of_registry
    from awareness_vllm.wmatrix.file import load
    from awareness_vllm.wmatrix.heads import head_shares

    basis = report.basis
    entry = next((e for e in registry if basis and e.digest == basis.digest), None)
    heads = head_shares(load(entry.path)) if entry else None
    document = page(report=report, matrix=of_registry(registry), heads=heads)
    path.write_text(document, encoding="utf-8")


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
    """The figures, each with where it comes from."""
    basis = result["basis"]
    where = "nobody knows" if basis is None else f"{basis['kind']}: {basis['source']}"
    kept = figure(result["estimated_retention"])
    if result["ci_low"] is not None:
        kept += f" ({result['ci_low']:.3f} … {result['ci_high']:.3f})"
    facts = result["facts"]
    positional = result["positional_basis"]
    times = ", ".join(f"{name} {s:.3g} s" for name, s in result["load_times_s"].items())
    return [
        f"{result['level'] or 'unknown'}: {result['recommendation']}",
        f"  compatibility score       {figure(result['compatibility_score'])}",
        f"  estimated retention       {kept}   [{where}]",
        *([f"  on its own last part      {interval(own)}"] if (own := result["on_itself"]) else []),
        f"  facts, share of native    {figure(facts['mean'] if facts else None)}",
        f"  head mapping quality      {figure(result['head_mapping_quality'])}",
        f"  positional compatibility  {figure(result['positional_compatibility'])}"
        + (f"   [{positional['kind']}]" if positional else ""),
        f"  memory on the target      {figure(result['target_memory_gb'], '.3g')} GB",
        f"  load time                 {times or 'unknown: run `awareness doctor` once'}",
    ]


def interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} ({found['ci_low']:.3f} … {found['ci_high']:.3f})"


def figure(value: float | None, how: str = ".3f") -> str:
    return "unknown" if value is None else f"{value:{how}}"
