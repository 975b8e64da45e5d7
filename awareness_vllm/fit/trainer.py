"""`WMatrixTrainer`: the fit by the names of the published interface."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from awareness_vllm.anchors.corpus import Document, load
from awareness_vllm.errors import BadInput, UnsupportedModel
from awareness_vllm.files import anchors_dir, read_text_file
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.wmatrix.file import WMatrix

DOMAINS = "domains.json"


class WMatrixTrainer:
    """The trainer of a W-Matrix from one model to another.

        trainer = WMatrixTrainer(source_model="models/a", target_model="models/b")
        trainer.configure(num_anchors=10000, layers="all", regularization=0.01)
        w_matrix = trainer.train(epochs=100, validation_split=0.2, early_stopping_patience=10)
        print(f"{w_matrix.accuracy:.3f} {w_matrix.reconstruction_error:.4f}")
        w_matrix.save("a-to-b.wmatrix")
        w_matrix.register(name="a-to-b")

    Args:
        source_model, target_model: Hugging Face folders.
        source_endpoint, target_endpoint: refused, since an endpoint returns text and no KV states.

    Raises:
        UnsupportedModel: a closed model, one whose cache cannot be mapped, or an endpoint.
    """

    def __init__(
        self,
        source_model: str | Path,
        target_model: str | Path,
        *,
        source_endpoint: str | None = None,
        target_endpoint: str | None = None,
    ) -> None:
        for endpoint in (source_endpoint, target_endpoint):
            if endpoint is not None:
                raise UnsupportedModel(
                    "a map cannot be learned through an endpoint: it returns text and no KV states",
                    found=endpoint,
                    expected="models that run in this process, as local Hugging Face folders",
                    remedy="download both models' weights and give their folders, without endpoint",
                )
        self.source, self.target = resolve_folder(source_model), resolve_folder(target_model)
        self.source_geometry = geometry_of(self.source)
        self.target_geometry = geometry_of(self.target)
        self.config = FitConfig()
        self.anchors: Sequence[str | Path] | None = None
        self.domains: Sequence[str] | None = None

    def configure(
        self,
        *,
        num_anchors: int | None = None,
        anchor_domains: Sequence[str] | None = None,
        anchors: Sequence[str | Path] | None = None,
        layers: int | Literal["all"] | None = None,
        optimization: str = "svd",
        regularization: float | None = None,
        rank: int | None = None,
        calibration: int | None = None,
        text: bool = True,
        seed: int | None = None,
    ) -> WMatrixTrainer:
        """Set what is given; the rest stays as it is.

        Args:
            num_anchors: tokens that both models read; each is one anchor.
            anchor_domains: which of the default anchors; all by default.
            anchors: files and folders of texts, instead of the default ones.
            layers: source layers to read, evenly spread; half by default.
            optimization: "svd", the reduced-rank ridge.
            regularization: ridge, as a share of the features' variance; by default chosen on
                held-out documents.
            rank: width of the latent.
            calibration: texts of calibration through the target; 0 for none.
            text: whether packages have their text; without, the map reads states alone.

        Raises:
            BadInput: another optimization, or both anchors and anchor_domains.
        """
        if optimization != "svd":
            raise BadInput("unknown optimization", found=optimization, expected="svd")
        if anchors is not None and anchor_domains is not None:
            raise BadInput("anchors and anchor_domains exclude each other", remedy="give one")
        given = {
            "tokens": num_anchors,
            "layers": len(self.source_geometry.layers) if layers == "all" else layers,
            "ridge": regularization,
            "rank": rank,
            "calibration": calibration,
            "seed": seed,
        }
        if not text:
            self.config = replace(self.config, predecessors=None)
        changes = {name: value for name, value in given.items() if value is not None}
        self.config = replace(self.config, **changes)  # type: ignore[arg-type]
        self.anchors = anchors if anchors is not None else self.anchors
        self.domains = anchor_domains if anchor_domains is not None else self.domains
        return self

    def train(
        self,
        *,
        epochs: int = 1,
        validation_split: float = 0.05,
        early_stopping_patience: int = 3,
        num_anchors: int | None = None,
        anchor_domains: Sequence[str] | None = None,
        folder: Path | None = None,
        progress: bool = True,
    ) -> WMatrix:
        """Fit and calibrate.

        Args:
            epochs: times the calibration texts are gone through.
            validation_split: share of the documents that is held out, to stop by and to score.
            early_stopping_patience: epochs without a better score there before training ends.
            folder: for unfinished work, so that a killed training goes on where it was.
        """
        self.configure(num_anchors=num_anchors, anchor_domains=anchor_domains)
        config = replace(
            self.config,
            epochs=epochs,
            held_out=validation_split,
            patience=early_stopping_patience,
        )
        return fit(
            self.source, self.target, self.documents(), config, folder=folder, progress=progress
        )

    def documents(self) -> list[Document]:
        """The anchors that were asked for."""
        if self.anchors is not None:
            return load([Path(path) for path in self.anchors])
        if self.domains is None:
            return load([anchors_dir()])
        return load(domain_folders(self.domains))


def domain_folders(domains: Sequence[str]) -> list[Path]:
    """The folders of some domains under `$AWARENESS_HOME/anchors`: those that `domains.json` there
    lists, or the folder of that name.

    Raises:
        BadInput: an unknown domain.
    """
    root = anchors_dir()
    has_list = (root / DOMAINS).is_file()
    try:
        domain_list = json.loads(read_text_file(root / DOMAINS)) if has_list else {}
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{root / DOMAINS} is not JSON", found=error) from error
    folders = {path.name: [path.name] for path in root.glob("*/")} | domain_list
    if unknown := set(domains) - set(folders):
        raise BadInput(
            "unknown anchor domain",
            found=sorted(unknown),
            expected=", ".join(sorted(folders)) or f"a folder of texts under {root}",
            remedy="put a folder of that name there, give files and folders as `anchors`, or "
            "install the default ones with `make anchors`",
        )
    return [root / name for domain in domains for name in folders[domain]]
