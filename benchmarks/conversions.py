"""What converting between positional encodings costs, measured between small models.

    python benchmarks/conversions.py [--through vllm] [--limit N] [--only ROW …] [--out FILE.json]

For each conversion of the published table a W-Matrix is fitted between two models of
`benchmarks/small_models.py` (made when missing), alike but for the encodings: same texts, same
tokenizer, same sizes, other seeds; same rank and anchors for every map. Then five arms on the
held-out sources, with transformers or through vLLM's offline engine. A row's *impact* is what its
retention lacks of that of the RoPE → RoPE map, as a share of it; the published column is a prior
and decides nothing.

About half of the texts go on as they were written, the others quote their own context.

The maps are kept in `$AWARENESS_HOME/wmatrices`, and not fitted again where they are there.
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
from small_models import GENERATED, make

from awareness_vllm.anchors.corpus import Document, load, windows
from awareness_vllm.evaluate.bootstrap import mean, resamples
from awareness_vllm.evaluate.conditions import EvalHarness
from awareness_vllm.evaluate.evaluate import TextFigures, evaluate_texts, take_excerpts
from awareness_vllm.evaluate.flops import map_flop, prefill_flop, share_of_prefill
from awareness_vllm.files import anchors_dir, wmatrices_dir
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.serving.plugin import vllm_version
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.file import load as load_wmatrix
from awareness_vllm.wmatrix.manifest import WMatrixManifest, is_readable, read_manifest

HELD_OUT = ("crawl", "debian-history", "wordnet")
CONTEXT, CONTINUATION = 300, 60
CHARACTERS, LIMIT = 1600, 500
"""Of a piece of an anchor, and its tokens: no model has seen later positions in training."""
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
    """A context from each document that is long enough, and what follows it.

    With some the text itself goes on, with others spans of the context come again, by the name.
    """
    tokenizer = load_tokenizer(str(folder))
    found: list[Document] = []
    for document in documents:
        tokens = tokenize(tokenizer, document.text)
        if len(tokens.ids) < CONTEXT + CONTINUATION + 1:
            continue
        kind = KINDS[zlib.crc32(document.name.encode()) % 2]
        text = document.text
        if kind == "quotes":
            head = text.encode()[: tokens.spans[CONTEXT - 1, 1]].decode(errors="ignore")
            text = head + "".join(quotes(head, document.name))
        found.append(Document(f"{kind}/{document.name}", text))
    return found


def quotes(text: str, seed: str, words: int = 24, count: int = 4) -> list[str]:
    """Spans of a text's words, each on a line of its own."""
    rng, split = random.Random(seed), text.split(" ")
    starts = (rng.randrange(max(1, len(split) - words)) for _ in range(count))
    return ["\n" + " ".join(split[i : i + words]) for i in starts]


@dataclass(frozen=True)
class Protocol:
    """How a conversion is measured: its map's fit, at most `limit` texts, `through` what the target
    is run, and whether the models are those that a few `short` steps give."""

    config: FitConfig
    limit: int | None
    through: Literal["transformers", "vllm"]
    short: bool


def mapped(source: Path, target: Path, config: FitConfig) -> WMatrix:
    """The W-Matrix between two models, fitted unless it has been."""
    suffix = "" if config.predecessors is not None else "-without-text"
    name = f"{source.parent.name}-{source.name}--{target.name}{suffix}"
    path = wmatrices_dir() / f"{name}.wmatrix"
    if is_readable(path) and is_of(read_manifest(path), source, target, config):
        return load_wmatrix(path)
    wmatrix = fit(source, target, anchor_pieces(target), config)
    wmatrix.register(name)
    return wmatrix


def is_of(manifest: WMatrixManifest, source: Path, target: Path, config: FitConfig) -> bool:
    """Whether a W-Matrix is what a fit would give again."""
    ends = ((manifest.source, source), (manifest.target, target))
    if not all(geometry.same_model(geometry_of(folder)) for geometry, folder in ends):
        return False
    fitted = manifest.fit if config.ridge else manifest.fit | {"ridge": None}  # it was chosen
    return fitted == asdict(config)


def measured(name: str, protocol: Protocol) -> tuple[TextFigures, dict[str, Any]]:
    """One conversion: its figures text by text, and what is said of its map."""
    conversion = CONVERSIONS[name]
    source, target = (
        make(model, short=protocol.short) for model in (conversion.source, conversion.target)
    )
    wmatrix = mapped(source, target, protocol.config)
    harness = EvalHarness(source, target, wmatrix)
    # Of sources that no model and no map has seen.
    texts = evaluation_texts(target, load([held_out_dir() / name for name in HELD_OUT]))
    sizes = {"context": CONTEXT, "continuation": CONTINUATION, "limit": protocol.limit}
    if protocol.through == "vllm":
        from served_arms import served_texts  # imports vLLM, which the other way does not need

        figures = served_texts(harness, take_excerpts(harness, texts, **sizes), max_model_len=LIMIT)
    else:
        figures = evaluate_texts(harness, texts, **sizes)
    native = prefill_flop(harness.target_model, CONTEXT)
    said = {
        "r2": wmatrix.manifest.r2,
        "position_embeddings": wmatrix.manifest.position_embeddings,
        "ridge": wmatrix.manifest.fit["ridge"],
        "share_of_prefill": share_of_prefill(map_flop(wmatrix), native, CONTEXT, 0),
    }
    return figures, said


def row(name: str, figures: TextFigures, reference: TextFigures | None) -> dict[str, Any]:
    """What was measured of a conversion."""
    conversion = CONVERSIONS[name]
    kinds = np.array([text.split("/")[0] for text in figures.names])
    found = {
        **asdict(conversion),
        **figures.summary(),
        "tokens_only": figures.retention("tokens_only"),
        "worth": mean(figures.nll("none") - figures.nll("native")),
        "kinds": {kind: figures.retention(rows=np.flatnonzero(kinds == kind)) for kind in KINDS},
    }
    return found | ({"impact": impact(figures, reference)} if reference else {})


def impact(figures: TextFigures, reference: TextFigures) -> dict[str, float]:
    """1 − retention as a share of the reference's, on the same texts, with its interval."""

    def kept(one: TextFigures, rows: np.ndarray) -> np.ndarray:
        native, memory, none = (one.nll(arm)[rows] for arm in ("native", "memory", "none"))
        return (none - memory).sum(-1) / (none - native).sum(-1)

    everything, picks = np.arange(len(figures.names)), resamples(len(figures.names))
    draws = 1 - kept(figures, picks) / kept(reference, picks)
    low, high = np.quantile(draws, (0.025, 0.975))
    value = 1 - kept(figures, everything) / kept(reference, everything)
    return {"mean": float(value), "ci_low": float(low), "ci_high": float(high)}


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """The table, with the published figures in a column of priors."""
    head = ("conversion", "worth, nats", "retention", "prose", "quotes", "tokens only")
    head += ("impact, %", "bar, %", "published, % (prior)")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for found in rows.values():
        kept, lost = found["retention"], found.get("impact")
        cells = (
            found["label"],
            f"{found['worth']['mean']:.2f}",
            f"{kept['mean']:.3f} ({kept['ci_low']:.3f} … {kept['ci_high']:.3f})",
            *(f"{found['kinds'][kind]['mean']:.3f}" for kind in KINDS),
            f"{found['tokens_only']['mean']:.3f}",
            "{mean:.1%} ({ci_low:.1%} … {ci_high:.1%})".format(**lost) if lost else "",
            f"≤ {found['bar']:.0%}",
            found["published"],
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
        figures, said = measured(name, protocol)
        reference = figures if name == REFERENCE else reference
        rows[name] = row(name, figures, reference) | {"map": said}
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
