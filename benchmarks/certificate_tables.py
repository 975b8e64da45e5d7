"""The tables of README and docs/results.md that a certificate fills.

    python benchmarks/certificate_tables.py maps/smollm2-135m--gemma3-270m.wmatrix

First the plan that a server has by default at each measured length, beside its controls, as in
README; then all plans; then exact matches by kind of case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from awareness_vllm.passages import BUDGET
from awareness_vllm.wmatrix.certificate import CONTROLS, TAIL, Certificate, Interval, Plan
from awareness_vllm.wmatrix.manifest import read_manifest
from awareness_vllm.wmatrix.plans import with_tail


def with_interval(figure: Interval | None) -> str:
    """A figure with its interval; nothing where it was not measured."""
    if figure is None:
        return ""
    return f"{figure.mean:.3f} ({figure.ci_low:.3f} … {figure.ci_high:.3f})"


def default_table(certificate: Certificate, context: int) -> str:
    """The plan of a server's defaults at one length, beside what its cost buys otherwise."""
    plan, alone = with_tail(certificate, context, TAIL, BUDGET), with_tail(certificate, context, 0)
    # Passages are re-read before a text's continuation, and quoted before a question.
    facts, facts_margin = plan.facts_quoted, plan.facts_quoted_margin
    rows = [
        ("native: the target reads the text", 1.0, "1", "1"),
        ("**memory, as served by default**", plan.cost, *arm(plan.retention, facts)),
        ("memory, the map alone", alone.cost, *arm(alone.retention, alone.facts)),
        *(
            (LABELS[name], plan.cost, *arm(plan.controls.get(name), plan.facts_controls.get(name)))
            for name in CONTROLS
        ),
        ("the text's tokens without the source's states", plan.cost, *arm(plan.tokens_only, None)),
        ("no memory", 0.0, "0", ""),
        ("**margin over the best control**", plan.cost, *arm(plan.margin, facts_margin)),
    ]
    lines = [
        f"| {plan.texts} texts, {plan.cases} facts, {plan.context} tokens "
        "| FLOP, share of prefill | retention | facts, share of native |",
        "|---|---|---|---|",
        *(f"| {name} | {cost:.0%} | {kept} | {facts} |" for name, cost, kept, facts in rows),
    ]
    return "\n".join(lines)


LABELS = {
    "truncation": "the same cost: only the last tokens read",
    "quotes": "the same cost: only the matching passages read",
    "half": "the same cost: half of either",
    "passages": "less: only the passages that are re-read",
}


def arm(retention: Interval | None, facts: Interval | None) -> tuple[str, str]:
    return with_interval(retention), with_interval(facts)


def plans_table(certificate: Certificate) -> str:
    """All plans."""
    lines = [
        "| tokens | tail | re-read | cost | retention | best control | margin | facts "
        "| quoted instead | best control | margin | quoted |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {p.context} | {p.tail} | {p.reread} | {p.cost:.0%} | {with_interval(p.retention)} "
        f"| {best(p.controls)} | {with_interval(p.margin)} | {with_interval(p.facts)} "
        f"| {with_interval(p.facts_quoted)} | {best(p.facts_controls)} "
        f"| {with_interval(p.facts_margin)} | {with_interval(p.facts_quoted_margin)} |"
        for p in certificate.plans
    ]
    return "\n".join(lines)


def best(controls: dict[str, Interval]) -> str:
    """The best control's name and figure."""
    name = max(controls, key=lambda name: controls[name].mean, default=None)
    return "" if name is None else f"{name} {controls[name].mean:.3f}"


def kinds_table(plan: Plan) -> str:
    """Exact matches by kind of case."""
    arms = list(next(iter(plan.facts_kinds.values()), {}))
    lines = [f"| {plan.context} tokens | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [
        f"| {kind} | {' | '.join(f'{figures[a]:.2f}' for a in arms)} |"
        for kind, figures in plan.facts_kinds.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("wmatrix", type=Path)
    args = parser.parse_args()
    certificate = read_manifest(args.wmatrix).measured
    if certificate is None:
        raise SystemExit("not certified")
    lengths = sorted({plan.context for plan in certificate.plans})
    print("\n\n".join(default_table(certificate, length) for length in lengths))
    print(f"\n{plans_table(certificate)}")
    for length in lengths:
        print(f"\n{kinds_table(with_tail(certificate, length, TAIL, BUDGET))}")


if __name__ == "__main__":
    main()
