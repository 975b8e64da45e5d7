"""A way over three models beside the direct map: what each keeps, and what each costs.

    python benchmarks/hops.py --source A --middle B --first A--B.wmatrix --maps FOLDER

The third model is the target of `benchmarks/small_models.py` (made when missing): maps that lead to
it are fitted in minutes, and kept in `--maps`. The way A → B → C is folded into one map, over a
bridge learned from the anchors, and measured like the direct one on held-out texts.
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


def fitted(source: Path, target: Path, anchors: list[Document], maps: Path) -> Path:
    """The map from a model to the small one, fitted unless it is there."""
    path = maps / f"{source.name}--{target.name}.wmatrix"
    if not path.is_file():
        config = FitConfig(tokens=30_000, rank=192, calibration=150)
        fit(source, target, anchors, config).save(path)
    return path


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways, measured on the same texts, and the operations of each map for a token."""
    target = make("target")
    anchors = anchor_pieces(target)
    direct, second = (fitted(m, target, anchors, args.maps) for m in (args.source, args.middle))
    models = (args.source, args.middle, target)
    aligner = MultiHopAligner([args.first, second, direct], models=models)
    found = aligner.find_optimal_path(
        args.source,
        target,
        uncertified=True,
        texts=evaluation_texts(target, load([held_out_dir() / name for name in HELD_OUT])),
        anchors=anchors,
        limit=args.limit,
    )
    over = MultiHopAligner([args.first, second], models=models)
    hops = over.find_optimal_path(args.source, target, uncertified=True)
    composed_map = found.composed_map if len(found.wmatrices) > 1 else over.compose(hops, anchors)
    assert composed_map is not None  # several hops were folded to be measured
    return {
        "route": found.route,
        "direct_retention": found.direct_retention,
        "optimal_retention": found.optimal_retention,
        "note": found.note,
        "operations": {
            "direct": map_flop(load_wmatrix(direct)),
            "folded": map_flop(composed_map),
            "second hop": map_flop(load_wmatrix(second)),
        },
        "ranks": {
            "direct": load_wmatrix(direct).manifest.rank,
            "folded": composed_map.manifest.rank,
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
    document = compared(args) | {
        "texts": args.limit,
        "measured": str(datetime.date.today()),
        "hardware": hardware(),
        "versions": versions(),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
