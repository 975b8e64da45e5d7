"""The cost of converting between positional encodings, measured between small models.

    python benchmarks/conversions.py [--through vllm] [--limit N] [--only ROW …] [--out FILE.json]

For each conversion of the published table a W-Matrix is fitted between two models of
`benchmarks/small_models.py` (made when missing), alike but for the encodings: same texts, same
tokenizer, same sizes, other seeds; same rank and anchors for every map. Then five arms on the
held-out sources, with transformers or through vLLM's offline engine. A row's *impact* is the
relative loss of retention against the RoPE → RoPE map; the published column is a prior and decides
nothing.

About half of the texts continue as written, the others quote their own context.

The maps are saved in `$AWARENESS_HOME/wmatrices`, and reused.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from awareness_demo.anchors import held_out_dir
from awareness_demo.wmatrices import is_readable
from small_models import GENERATED, make

from awareness_vllm.anchors.corpus import Document, load, windows
from awareness_vllm.evaluate.bootstrap import mean, resamples
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import TextFigures, evaluate_texts, take_excerpts
from awareness_vllm.evaluate.flops import map_flop, plan_cost
from awareness_vllm.files import anchors_dir, wmatrices_dir
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving.plugin import vllm_version
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix
from awareness_vllm.wmatrix.manifest import WMatrixManifest, read_manifest

HELD_OUT = ("crawl", "debian-history", "wordnet")
CONTEXT, CONTINUATION = 300, 60
CHARACTERS, LIMIT = 1600, 500
"""Characters and tokens of a piece of an anchor: the models were trained on no later positions."""
KINDS = ("prose", "quotes")


@dataclass(frozen=True)
class Conversion:
    """A row of the published table: two small models, and its figure, in percent."""

    source: str
    target: str
    label: str
    published: str
    bar: float


REFERENCE = "rope"
CONVERSIONS = {
    "rope": Conversion("rope", "target", "RoPE → RoPE", "< 1", 0.01),
    "learned": Conversion("learned", "target", "learned → RoPE", "1–3", 0.03),
    "to-learned": Conversion("rope", "learned", "RoPE → learned", "1–3", 0.03),
    "alibi": Conversion("alibi", "target", "ALiBi → RoPE", "3–5", 0.05),
    "window": Conversion("window", "target", "RoPE + window → RoPE", "1–2", 0.02),
}


def anchor_pieces(folder: Path) -> list[Document]:
    """The anchors' real texts in pieces that the small models can read."""
    tokenizer = load_tokenizer(str(folder))
    sources = sorted(p for p in anchors_dir().iterdir() if p.name not in GENERATED)
    pieces = [
        Document(document.name, piece)
        for document in load(sources)
        for piece in windows(document, CHARACTERS)
    ]
    picked = np.random.default_rng(0).permutation(len(pieces))[:1000]
    return [pieces[i] for i in picked if len(tokenize(tokenizer, pieces[i].text).ids) <= LIMIT]


def evaluation_texts(folder: Path, documents: Sequence[Document]) -> list[Document]:
    """A context and a continuation from each document that is long enough: by its name the text
    itself, or quotes of the context."""
    tokenizer = load_tokenizer(str(folder))
    texts: list[Document] = []
    for document in documents:
        tokens = tokenize(tokenizer, document.text)
        if len(tokens.ids) < CONTEXT + CONTINUATION + 1:
            continue
        kind = KINDS[zlib.crc32(document.name.encode()) % 2]
        text = document.text
        if kind == "quotes":
            head = text.encode()[: tokens.spans[CONTEXT - 1, 1]].decode(errors="ignore")
            text = head + "".join(quotes(head, document.name))
        texts.append(Document(f"{kind}/{document.name}", text))
    return texts


def quotes(text: str, seed: str, words: int = 24, count: int = 4) -> list[str]:
    """Spans of a text's words, each on its own line."""
    rng, split = random.Random(seed), text.split(" ")
    starts = (rng.randrange(max(1, len(split) - words)) for _ in range(count))
    return ["\n" + " ".join(split[i : i + words]) for i in starts]


@dataclass(frozen=True)
class Protocol:
    """The measurement of a conversion: its map's fit, at most `limit` texts, the target's engine
    (`through`), and whether the models are the `short` ones of a few training steps."""

    config: FitConfig
    limit: int | None
    through: Literal["transformers", "vllm"]
    short: bool


def load_or_fit(source: Path, target: Path, config: FitConfig) -> WMatrix:
    """The W-Matrix between two models, fitted unless saved by an earlier run."""
    suffix = "" if config.predecessors is not None else "-without-text"
    name = f"{source.parent.name}-{source.name}--{target.name}{suffix}"
    path = wmatrices_dir() / f"{name}.wmatrix"
    if is_readable(path) and is_fit_of(read_manifest(path), source, target, config):
        return load_wmatrix(path)
    wmatrix = fit(source, target, anchor_pieces(target), config)
    wmatrix.register(name)
    return wmatrix


def is_fit_of(manifest: WMatrixManifest, source: Path, target: Path, config: FitConfig) -> bool:
    """Whether a W-Matrix is the result of this fit."""
    ends = ((manifest.source, source), (manifest.target, target))
    if not all(geometry.same_model(geometry_of(folder)) for geometry, folder in ends):
        return False
    fitted = manifest.fit if config.ridge else manifest.fit | {"ridge": None}  # it was chosen
    return fitted == asdict(config)


def measure_conversion(name: str, protocol: Protocol) -> tuple[TextFigures, dict[str, Any]]:
    """One conversion: its figures by text, and facts about its map."""
    conversion = CONVERSIONS[name]
    source, target = (
        make(model, short=protocol.short) for model in (conversion.source, conversion.target)
    )
    wmatrix = load_or_fit(source, target, protocol.config)
    harness = EvalHarness(source, target, wmatrix)
    # Sources that no model and no map was trained on.
    texts = evaluation_texts(target, load([held_out_dir() / name for name in HELD_OUT]))
    sizes = {"context": CONTEXT, "continuation": CONTINUATION, "limit": protocol.limit}
    if protocol.through == "vllm":
        from served_arms import served_texts  # imports vLLM, which the other way does not need

        figures = served_texts(harness, take_excerpts(harness, texts, **sizes), max_model_len=LIMIT)
    else:
        figures = evaluate_texts(harness, texts, **sizes)
    about = {
        "r2": wmatrix.manifest.r2,
        "position_embeddings": wmatrix.manifest.position_embeddings,
        "ridge": wmatrix.manifest.fit["ridge"],
        "share_of_prefill": plan_cost(map_flop(wmatrix), harness.prefill, CONTEXT),
    }
    return figures, about


def row(name: str, figures: TextFigures, reference: TextFigures | None) -> dict[str, Any]:
    """The row of a conversion."""
    conversion = CONVERSIONS[name]
    kinds = np.array([text.split("/")[0] for text in figures.names])
    result = {
        **asdict(conversion),
        **figures.summary(),
        "tokens_only": figures.retention("tokens_only"),
        "worth": mean(figures.nll("none") - figures.nll("native")),
        "kinds": {kind: figures.retention(rows=np.flatnonzero(kinds == kind)) for kind in KINDS},
    }
    return result | ({"impact": impact(figures, reference)} if reference else {})


def impact(figures: TextFigures, reference: TextFigures) -> dict[str, float]:
    """1 − retention as a share of the reference's, on the same texts, with its interval."""

    def retention_of(one: TextFigures, rows: np.ndarray) -> np.ndarray:
        native, memory, none = (one.nll(name)[rows] for name in ("native", "memory", "none"))
        return (none - memory).sum(-1) / (none - native).sum(-1)

    everything, picks = np.arange(len(figures.names)), resamples(len(figures.names))
    draws = 1 - retention_of(figures, picks) / retention_of(reference, picks)
    low, high = np.quantile(draws, (0.025, 0.975))
    value = 1 - retention_of(figures, everything) / retention_of(reference, everything)
    return {"mean": float(value), "ci_low": float(low), "ci_high": float(high)}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table, with the published figures in a column of priors."""
    head = ("conversion", "worth, nats", "retention", "prose", "quotes", "tokens only")
    head += ("impact, %", "bar, %", "published, % (prior)")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in rows.values():
        retention, lost = entry["retention"], entry.get("impact")
        cells = (
            entry["label"],
            f"{entry['worth']['mean']:.2f}",
            f"{retention['mean']:.3f} ({retention['ci_low']:.3f} … {retention['ci_high']:.3f})",
            *(f"{entry['kinds'][kind]['mean']:.3f}" for kind in KINDS),
            f"{entry['tokens_only']['mean']:.3f}",
            "{mean:.1%} ({ci_low:.1%} … {ci_high:.1%})".format(**lost) if lost else "",
            f"≤ {entry['bar']:.0%}",
            entry["published"],
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--calibration", type=int, default=200)
    parser.add_argument("--without-text", action="store_true", help="the source's states alone")
    parser.add_argument("--through", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--short", action="store_true", help="models of a few steps, for CI")
    parser.add_argument("--limit", type=int, help="at most so many texts")
    parser.add_argument("--only", nargs="+", choices=CONVERSIONS, default=list(CONVERSIONS))
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    config = FitConfig(
        tokens=args.tokens,
        rank=args.rank,
        layers=99,  # all that there are
        calibration=args.calibration,
        **({"predecessors": None} if args.without_text else {}),
    )
    protocol = Protocol(config, args.limit, args.through, args.short)
    rows: dict[str, dict[str, Any]] = {}
    reference: TextFigures | None = None
    for name in args.only:
        figures, about = measure_conversion(name, protocol)
        reference = figures if name == REFERENCE else reference
        rows[name] = row(name, figures, reference) | {"map": about}
        print(markdown(rows), flush=True)
    document = {
        "through": args.through,
        "fit": asdict(config),
        "rows": rows,
        "measured": str(datetime.date.today()),
        "hardware": hardware(),
        "versions": versions() | ({"vllm": vllm_version()} if args.through == "vllm" else {}),
    }
    print(text := json.dumps(document, indent=1))
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
