"""What `awareness align-on-demand` reaches within budgets of minutes, on two models of your own.

    python benchmarks/align_on_demand.py --budgets 5 15 30 --out docs/figures/align-on-demand.json

For each budget the command runs as a user runs it, in a home of its own; then every map, and the
one that is shipped, is measured on the same held-out texts and on the needles of odd index, which
no choice was made on and which the command certifies nothing by. A run that is killed goes on where
it was when it is started again. The last lines are the table of docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awareness_demo.anchors import held_out_dir

from awareness_vllm.anchors.corpus import load
from awareness_vllm.cli.eval import read_cases
from awareness_vllm.evaluate.arms import MAP_ALONE, PlanShape
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import (
    CaseFigures,
    TextFigures,
    evaluate_cases,
    evaluate_texts,
)
from awareness_vllm.files import anchors_dir, atomic_write, home, models_dir
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.certificate import CONTROLS, TAIL
from awareness_vllm.wmatrix.file import load as load_wmatrix

TEXTS = ("crawl", "debian-history", "wordnet")
CONTEXT = 300
SHAPES = (MAP_ALONE, PlanShape(TAIL))
"""The map alone, and as a server reads it by default."""
SHIPPED = Path(__file__).parents[1] / "maps"


def align(args: argparse.Namespace, minutes: float, cases: Path) -> dict[str, Any]:
    """What the command printed for a budget, its error where it refused; its map is in
    `args.work`."""
    printed = args.work / f"{name_of(minutes)}.json"
    if printed.is_file():  # of a run that was killed while its map was judged
        known: dict[str, Any] = json.loads(printed.read_text())
        return known
    held_out = held_out_dir()
    command: list[object] = [
        *(sys.executable, "-m", "awareness_vllm.cli.main", "align-on-demand", "--json"),
        *("--source", args.source, "--target", args.target, "--budget", f"{minutes}m"),
        *("--name", name_of(minutes), "--anchors", anchors_dir(), "--cases", cases),
        *("--texts", *(held_out / name for name in TEXTS)),
    ]
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"AWARENESS_HOME": str(args.work)},
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if "error" not in found:
        printed.write_text(done.stdout)
    return found


def name_of(minutes: float) -> str:
    return f"within-{minutes:g}m"


def judge(args: argparse.Namespace, wmatrix: Path, cases: Sequence[dict[str, Any]]) -> Any:
    """A map's figures on the benchmark's own texts and cases."""
    harness = EvalHarness(args.source, args.target, load_wmatrix(wmatrix))
    texts = load([held_out_dir() / name for name in TEXTS])
    plans: dict[str, Any] = {"shapes": SHAPES, "controls": CONTROLS}
    on_texts = evaluate_texts(harness, texts, context=CONTEXT, limit=args.limits[0], **plans)
    on_cases = evaluate_cases(harness, cases, limit=args.limits[1], **plans)
    return {shape.condition(): figures(on_texts, on_cases, shape) for shape in SHAPES}


def figures(texts: TextFigures, cases: CaseFigures, shape: PlanShape) -> dict[str, Any]:
    """One plan's figures beside its best control."""
    memory = shape.condition()
    controls = [c for name in CONTROLS if (c := shape.condition(name)) in texts.conditions]
    return {
        "texts": len(texts.names),
        "retention": texts.retention(memory),
        "margin": texts.margin(memory, controls),
        "top1": float(texts.conditions[memory][:, 2].mean()),
        "tokens_only": texts.retention(shape.condition("tokens_only")),
        "cases": len(cases.kinds),
        "facts": float(cases.exact(memory).mean()),
        "facts_native": float(cases.exact("native").mean()),
        "facts_of_native": cases.recall(memory),
        "facts_controls": max(float(cases.exact(name).mean()) for name in controls),
    }


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        "| budget | took | anchors · steps | retention, the map alone | with the last "
        f"{TAIL} tokens native | margin | facts: map alone · native |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "refused" in row:
            lines.append(f"| {name} | refused: {row['refused']['expected']} | | | | | |")
            continue
        alone, served = (row["judged"][shape.condition()] for shape in SHAPES)
        run = row.get("run")
        cells = [
            name,
            f"{run['seconds'] / 60:.1f} min" if run else "",
            f"{run['anchors']:,} · {run['plan']['steps']}" if run else "",
            interval(alone["retention"]),
            interval(served["retention"]),
            interval(served["margin"]),
            f"{alone['facts']:.2f} · {alone['facts_native']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} ({figure['ci_low']:.3f} … {figure['ci_high']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=models_dir() / "smollm2-135m")
    parser.add_argument("--target", type=Path, default=models_dir() / "gemma3-270m")
    parser.add_argument("--shipped", type=Path, help="a map to measure beside them")
    parser.add_argument("--budgets", type=float, nargs="+", default=(5, 15, 30), metavar="MINUTES")
    parser.add_argument("--limits", type=int, nargs=2, default=(32, 48), metavar=("TEXTS", "CASES"))
    parser.add_argument("--work", type=Path, default=home() / "align-on-demand")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    cases = read_cases(held_out_dir() / "needles" / "cases.jsonl")
    cases = [case for case in cases if case.get("tokens") == CONTEXT]
    known = args.work / "cases.jsonl"  # the command certifies by the others
    known.write_text("\n".join(map(json.dumps, cases[::2])))
    rows: dict[str, Any] = {}
    if args.out.is_file():
        rows = json.loads(args.out.read_text())["rows"]
    shipped = args.shipped or SHIPPED / f"{args.source.name}--{args.target.name}.wmatrix"
    wanted = [(f"{minutes:g} min", minutes) for minutes in args.budgets]
    for name, minutes in [*wanted, *([("shipped", None)] if shipped.is_file() else [])]:
        if name in rows:
            continue
        run = None if minutes is None else align(args, minutes, known)
        if run is not None and "error" in run:
            rows[name] = {"refused": run["error"]}
        else:
            path = shipped if run is None else Path(run["path"])
            rows[name] = {"judged": judge(args, path, cases[1::2])} | ({"run": run} if run else {})
        document = {
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "versions": versions(),
            "limits": list(args.limits),
            "rows": rows,
        }
        with atomic_write(args.out) as draft:
            draft.write_text(json.dumps(document, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
