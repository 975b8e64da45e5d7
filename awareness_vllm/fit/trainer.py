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
from awareness_vllm.fit.endpoint import Endpoint, EndpointReader
from awareness_vllm.fit.fit import fit
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
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
        source_model, target_model: Hugging Face folders; the source's, with an endpoint, the name
            that it is served by.
        source_endpoint: a vLLM server with our plugin, started with --allow-capture, that reads the
            anchors: its captures bring states, tokens and geometry.
        target_endpoint: a server of the same kind whose model is checked to be the target's. It can
            stand for no folder: calibration takes gradients through the target.
        api_key: of both endpoints.

    Raises:
        UnsupportedModel: a closed model, one whose cache cannot be mapped, a target without a
            folder, or an endpoint of another model.
        BadInput, Unauthorized, CaptureNotAllowed: an endpoint that gives no captures.
    """

    def __init__(
        self,
        source_model: str | Path,
        target_model: str | Path,
        *,
        source_endpoint: str | None = None,
        target_endpoint: str | None = None,
        api_key: str | None = None,
    ) -> None:
        self.target = target_folder(target_model, target_endpoint)
        self.target_geometry = geometry_of(self.target)
        if target_endpoint is not None:
            check_served(Endpoint(target_endpoint, None, api_key), self.target_geometry)
        self.endpoint: Endpoint | None = None
        if source_endpoint is not None:
            self.endpoint = Endpoint(source_endpoint, str(source_model), api_key)
            self.source, self.source_geometry = Path(), self.endpoint.geometry
        else:
            self.source = resolve_folder(source_model)
            self.source_geometry = geometry_of(self.source)
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
            self.source,
            self.target,
            self.documents(),
            config,
            folder=folder,
            progress=progress,
            reader=self.reader(config),
        )

    def reader(self, config: FitConfig) -> Reader | None:
        """The reader of a source behind an endpoint; None for one that is a folder."""
        if self.endpoint is None:
            return None
        settings = config.predecessors, config.layers, config.resolved().device
        return EndpointReader(self.source, self.target, *settings, endpoint=self.endpoint)

    def documents(self) -> list[Document]:
        """The anchors that were asked for."""
        if self.anchors is not None:
            return load([Path(path) for path in self.anchors])
        if self.domains is None:
            return load([anchors_dir()])
        return load(domain_folders(self.domains))


def target_folder(model: str | Path, endpoint: str | None) -> Path:
    """The folder of the target.

    Raises:
        UnsupportedModel: there is none; of a target that only an endpoint has, the error says what
            of a fit that could give, and what not.
    """
    try:
        return resolve_folder(model)
    except UnsupportedModel as error:
        if endpoint is None:
            raise
        raise UnsupportedModel(
            f"no map can be learned towards {model} through an endpoint alone",
            found=f"{endpoint}, which by captures gives the target's states of whole texts, and no "
            "more: no gradients, by which the fit weighs states and calibrates; no embeddings of "
            "its tokens, which the map reads; no states of its first tokens alone, the sink",
            expected="the target's folder as target_model; the source may be behind an endpoint",
            remedy="download the target's weights and give their folder",
        ) from error


def check_served(endpoint: Endpoint, target: Geometry) -> None:
    """Raises UnsupportedModel where an endpoint's model is not the target."""
    if not endpoint.geometry.same_model(target):
        raise UnsupportedModel(
            f"{endpoint.url} serves another model than the target",
            found=endpoint.geometry.identity,
            expected=target.identity,
            remedy="give the folder that the server was started with",
        )


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
