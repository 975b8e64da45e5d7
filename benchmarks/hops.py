"""A route over three models beside the direct map: retention and cost of both.

    python benchmarks/hops.py --source A --middle B --first A--B.wmatrix --maps FOLDER

The third model is the target of `benchmarks/small_models.py` (made when missing): maps that lead to
it are fitted in minutes, and saved in `--maps`. The route A → B → C is composed into one map, over
a bridge learned from the anchors, and measured like the direct one on held-out texts.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from awareness_demo.anchors import held_out_dir
from conversions import HELD_OUT, anchor_pieces, evaluation_texts
from small_models import make

from awareness_vllm import MultiHopAligner
from awareness_vllm.anchors.corpus import Document, load
from awareness_vllm.evaluate.flops import map_flop
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.provenance import hardware, versions
from awareness_vllm.wmatrix.file import load as load_wmatrix


def load_or_fit(source: Path, target: Path, anchors: list[Document], maps: Path) -> Path:
    """The map from a model to the small one, fitted unless saved by an earlier run."""
    file = maps / f"{source.name}--{target.name}.wmatrix"
    if not file.is_file():
        config = FitConfig(tokens=30_000, rank=192, calibration=150)
        fit(source, target, anchors, config).save(file)
    return file


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both routes, measured on the same texts, and the operations of each map per token."""
    target = make("target")
    anchors = anchor_pieces(target)
    direct, second = (
        load_or_fit(m, target, anchors, args.maps) for m in (args.source, args.middle)
    )
    models = (args.source, args.middle, target)
    aligner = MultiHopAligner([args.first, second, direct], models=models)
    path = aligner.find_optimal_path(
        args.source,
        target,
        uncertified=True,
        texts=evaluation_texts(target, load([held_out_dir() / name for name in HELD_OUT])),
        anchors=anchors,
        limit=args.limit,
    )
    over = MultiHopAligner([args.first, second], models=models)
    hops = over.find_optimal_path(args.source, target, uncertified=True)
    composed_map = path.composed_map if len(path.wmatrices) > 1 else over.compose(hops, anchors)
    assert composed_map is not None  # several hops were composed to be measured
    return {
        "route": path.route,
        "direct_retention": path.direct_retention,
        "optimal_retention": path.optimal_retention,
        "note": path.note,
        "operations": {
            "direct": map_flop(load_wmatrix(direct)),
            "composed": map_flop(composed_map),
            "second hop": map_flop(load_wmatrix(second)),
        },
        "ranks": {
            "direct": load_wmatrix(direct).manifest.rank,
            "composed": composed_map.manifest.rank,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--middle", type=Path, required=True)
    parser.add_argument("--first", type=Path, required=True, help="the map between these two")
    parser.add_argument("--maps", type=Path, required=True, help="where the other two are kept")
    parser.add_argument("--limit", type=int, default=24)
    args = parser.parse_args()
    document = compare(args) | {
        "texts": args.limit,
        "measured": str(datetime.date.today()),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
