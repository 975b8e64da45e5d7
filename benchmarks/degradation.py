"""The sources of a pair's loss, measured by maps with and without constraints, beside the table.

    python benchmarks/degradation.py --source S --target T --wmatrix pair.wmatrix \
        --texts HELD_OUT… --contexts 150 300 600 --limit 8 16 8 --out FILE.json --plot FILE.png \
        --record

Five constraints, one for each published source of degradation, make a naive conversion of a map;
all 32 maps in between are fitted on the same anchors and measured on the same texts (definitions:
`benchmarks/attribution/constraints.py`). The loss is by how much the target's predictions are
worse after the memory than after native reading, in nats: of the actual tokens (NLL), and as the
divergence from native predictions (KL). The cost of a constraint is the loss that lifting it
removes, a mean over all orders of lifting (Shapley values): with the remainder when all are lifted
these add up to the loss. By kind of text and by length of context. `--record` saves the figures
beside the W-Matrix, where `load_for` finds them; the plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from attribution.attribution import attribute
from attribution.shares import SOURCES
from plotting import pyplot

from awareness_vllm.anchors.corpus import load
from awareness_vllm.compatibility.degradation import Degradation, Part
from awareness_vllm.compatibility.report import REMAINDER
from awareness_vllm.files import anchors_dir
from awareness_vllm.wmatrix.certificate import Interval


def main() -> None:
    args = arguments()
    result = attribute(
        args.wmatrix,
        args.source,
        args.target,
        load(args.texts),
        load(args.anchors or [anchors_dir()]),
        contexts=dict(zip(args.contexts, itertools.cycle(args.limit))),
        continuation=args.continuation,
        tokens=args.tokens,
        folder=args.work,
    )
    print("\n".join(lines(result)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(result.model_dump_json(indent=1) + "\n")
    if args.record:
        print(f"kept in {result.save(args.wmatrix)}")
    if args.plot:
        plot(result, f"{Path(args.source).name} → {Path(args.target).name}", args.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--texts", nargs="+", required=True, type=Path)
    parser.add_argument(
        "--limit", nargs="+", type=int, default=[16], help="texts: for all lengths, or for each"
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[300])
    parser.add_argument("--continuation", type=int, default=60)
    parser.add_argument("--anchors", nargs="+", type=Path, help="by default the installed ones")
    parser.add_argument("--tokens", type=int, default=100_000, help="of anchors")
    parser.add_argument("--work", type=Path, help="keep unfinished work here, to go on with it")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    parser.add_argument("--record", action="store_true", help="keep the JSON beside the W-Matrix")
    parser.add_argument("--plot", type=Path, help="write a plot here; needs matplotlib")
    return parser.parse_args()


def lines(result: Degradation) -> list[str]:
    """The figures for a terminal, in nats; shares beside the published ones."""
    rows = []
    for length, lost in result.contexts.items():
        for kind, measures in {"all": lost.all, **lost.kinds}.items():
            for measure, part in (("NLL", measures.nll), ("KL", measures.kl)):
                head = f"{length} tokens, {kind}, {part.n} texts, by {measure}"
                rows += [head, *part_lines(part)]
    return rows


def part_lines(part: Part) -> list[str]:
    shares = {share.source: share for share in part.shares}
    with_positions = {share.source: share.share.mean for share in part.placed_shares}
    rows = [f"  {'all constraints':24}{nats(part.loss)}"]
    for name, result in {**part.recovered, REMAINDER: part.remainder}.items():
        line = f"  {name:24}{nats(result)}"
        if share := shares.get(name):
            line += f"   share {share.share.mean:4.0%} ({share.share.ci_low:.0%} … "
            line += f"{share.share.ci_high:.0%})"
            line += f", published {share.prior:.0%}" if share.prior is not None else ""
        if name in with_positions:
            line += f"   with true positions {with_positions[name]:4.0%}"
        if alone := part.alone.get(name):
            line += f"   alone {nats(alone)}"
        rows.append(line)
    rows.append(f"  {'regression of the rank':24}{nats(part.uncalibrated)}")
    return [*rows, f"  {'the W-Matrix itself':24}{nats(part.served)}"]


def nats(i: Interval) -> str:
    return f"{i.mean:8.4f} ({i.ci_low:.4f} … {i.ci_high:.4f})"


def plot(result: Degradation, title: str, path: Path) -> None:
    """Shares at the protocol's length beside the published ones; divergence by kind of text and by
    length of context."""
    length = 300 if 300 in result.contexts else min(result.contexts)
    lost = result.contexts[length]
    figure, (left, middle, right) = pyplot().subplots(
        1, 3, figsize=(17, 4.5), layout="constrained", width_ratios=(1, 1.3, 1)
    )
    shares = {"by KL": lost.all.kl.shares, "by NLL": lost.all.nll.shares}
    names = [*SOURCES, REMAINDER]
    bars(left, names, {by: [s.share for s in some] for by, some in shares.items() if some})
    left.plot(range(len(SOURCES)), list(SOURCES.values()), "kx", label="published (prior)")
    left.set_ylabel("share of a naive conversion's loss")
    left.set_title(f"{title}, {length} tokens, {lost.all.kl.n} texts")
    kinds = {f"{kind} ({m.kl.n})": [*plotted(m.kl).values()] for kind, m in lost.kinds.items()}
    bars(middle, list(plotted(lost.all.kl)), kinds)
    middle.set_ylabel("KL, nats per token")
    middle.set_title(f"by kind of text, {length} tokens")
    lengths = list(result.contexts)
    for name in plotted(lost.all.kl):
        line = [plotted(each.all.kl)[name] for each in result.contexts.values()]
        means = [i.mean for i in line]
        right.errorbar(lengths, means, yerr=errors(line), fmt="o-", capsize=3, label=name)
    right.set_xlabel("tokens of context")
    right.set_ylabel("KL, nats per token")
    right.set_title("by length of context")
    for axes in (left, middle, right):
        axes.axhline(0, color="grey", linewidth=0.6)
        axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plotted(part: Part) -> dict[str, Interval]:
    """The intervals to plot, by name."""
    return {"all constraints": part.loss, **part.recovered, REMAINDER: part.remainder}


def bars(axes: Any, names: list[str], groups: dict[str, list[Interval]]) -> None:
    """Bars side by side for each group, with their intervals."""
    each = 0.8 / len(groups)
    for turn, (label, values) in enumerate(groups.items()):
        x = [place + (turn - (len(groups) - 1) / 2) * each for place in range(len(names))]
        means = [value.mean for value in values]
        axes.bar(x, means, each, yerr=errors(values), capsize=2, label=label)
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=7)


def errors(values: list[Interval]) -> list[list[float]]:
    """Intervals as matplotlib takes them: distances below and above the means."""
    return [
        [max(0.0, i.mean - i.ci_low) for i in values],
        [max(0.0, i.ci_high - i.mean) for i in values],
    ]


if __name__ == "__main__":
    main()
