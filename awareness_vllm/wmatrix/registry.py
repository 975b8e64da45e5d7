"""The registry of W-Matrix files, read as far as their manifests: which map leads where."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from awareness_vllm.errors import AwarenessError, BadInput, NoWMatrix, escaped
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import is_model_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import Manifest, StoredLatent
from awareness_vllm.trust.policy import Signers, TrustPolicy
from awareness_vllm.wmatrix.certificate import Certificate
from awareness_vllm.wmatrix.manifest import WMatrixManifest, read_digests

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WMatrixEntry:
    """A W-Matrix file; aligned memories and cache salts are keyed by its `digest`, latents by that
    of its `tensors`.

    `signed_by` and `certificate_signed_by` are the names of the trusted keys that signed the file
    and its certificate. The certificate is `claimed` where none of them signed it, and there is a
    trust policy or no file, but a registry's listing: its figures are shown, and decide nothing.
    """

    path: Path
    manifest: WMatrixManifest
    digest: str
    tensors: str = ""
    signed_by: str | None = None
    certificate_signed_by: str | None = None
    claimed: bool = False
    listed: bool = False

    @classmethod
    def read(cls, path: Path, trust: TrustPolicy | None = None) -> WMatrixEntry:
        """A file, and by a trust policy who signed it. Raises WMatrixCorrupt, SignatureInvalid."""
        entry = cls(path, *read_digests(path))
        if not trust:
            return entry
        signed_by = trust.signer(path, entry.digest, "wmatrix")
        if (statement := entry.manifest.certificate_statement) is None:
            return replace(entry, signed_by=signed_by)
        digest = hashlib.sha256(statement).hexdigest()
        measured_by = trust.signer(path, digest, "certificate")
        return replace(
            entry,
            signed_by=signed_by,
            certificate_signed_by=measured_by,
            claimed=measured_by is None and entry.certificate is not None,
        )

    @functools.cached_property
    def certificate(self) -> Certificate | None:
        """The map's measured figures; None without a certificate that this version reads."""
        certificate = self.manifest.measured
        if certificate is None and self.manifest.certificate is not None:
            logger.warning("%s: its certificate is an older version's: certify it again", self)
        return certificate

    def signers(self, package: str | None) -> Signers:
        """The trusted keys behind a memory of a package that `package` signed, and this map."""
        return Signers(
            package=package, wmatrix=self.signed_by, certificate=self.certificate_signed_by
        )

    def leads(self, source: Geometry, target: Geometry) -> bool:
        """Whether the map is one from these exact weights to those."""
        return self.manifest.source.same_model(source) and self.manifest.target.same_model(target)

    def made(self, latent: StoredLatent) -> bool:
        """Whether the map is one that a latent can have come of, and whose states it gives. What a
        residual map adds to is in no latent."""
        manifest = self.manifest
        can = manifest.reads_tokens and not manifest.residual and manifest.rank == latent.rank
        return can and self.tensors == latent.wmatrix

    def __str__(self) -> str:
        where = f"{self.path.name}, not pulled" if self.listed else self.path.name
        name = f"{self.manifest.source.name} → {self.manifest.target.name} ({where})"
        return escaped(name)


class MoreMaps(Protocol):
    """Where there may be maps that no file at hand is: a registry of artefacts."""

    def find(
        self, source: Geometry, target: Geometry, has_text: bool, latent: StoredLatent | None = None
    ) -> WMatrixEntry | None:
        """The best map between two models, or the one that made a `latent`. Raises
        RegistryError."""
        ...


@dataclass(frozen=True)
class Registry:
    """The W-Matrices that a server, a check or a router chooses from, in the operator's order, and
    where to look for those that are not among them."""

    entries: tuple[WMatrixEntry, ...] = ()
    more: MoreMaps | None = None

    @classmethod
    def read(
        cls,
        paths: Registry | Iterable[str | Path] | None = None,
        trust: TrustPolicy | None = None,
        more: MoreMaps | None = None,
    ) -> Registry:
        """The registry of some files and folders; a registry is returned unchanged.

        Args:
            paths: by default `$AWARENESS_HOME/wmatrices`, which need not exist. In a folder, which
                is in the order of names, files that cannot be used are skipped with a warning.
            trust: whose signatures count.
            more: is asked for a map where none of these leads.

        Raises:
            WMatrixCorrupt, SignatureInvalid: a file among `paths` themselves that cannot be used.
        """
        if isinstance(paths, Registry):
            return paths
        entries: list[WMatrixEntry] = []
        if paths is None:
            paths = [wmatrices_dir()] if wmatrices_dir().is_dir() else []
        for path in map(Path, paths):
            if not path.is_dir():
                entries.append(WMatrixEntry.read(path, trust))
                continue
            for file in sorted(path.glob("*.wmatrix")):
                try:
                    entries.append(WMatrixEntry.read(file, trust))
                except AwarenessError as error:
                    logger.warning("skipped %s: %s", escaped(file.name), error)
        return cls(tuple(entries), more)

    def __iter__(self) -> Iterator[WMatrixEntry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "; ".join(map(str, self.entries)) or "no W-Matrix at all"

    def usable(self, has_text: bool) -> Registry:
        """The maps for packages with their text, which read its tokens, or without it."""
        return Registry(tuple(e for e in self.entries if e.manifest.reads_tokens == has_text))

    def certified(self) -> Registry:
        """The maps with a certificate that is not merely claimed."""
        return Registry(tuple(e for e in self.entries if e.certificate and not e.claimed))

    def find(self, source: Geometry, target: Geometry, has_text: bool) -> WMatrixEntry:
        """The map that serves memories of one model on another: of several the first, since
        figures in a file are the word of whoever wrote it, and the order is the operator's. Only
        where there is none, `more` is asked.

        Raises:
            NoWMatrix: there is none; the error names the maps that there are. RegistryError: `more`
                cannot be asked.
        """
        for entry in self.usable(has_text):
            if entry.leads(source, target):
                return entry
        if self.more and (found := self.more.find(source, target, has_text)):
            return found
        if error := self._only_tokenizers_differ(source, target):
            raise error
        from_source = [e for e in self.entries if e.manifest.source.same_model(source)]
        raise NoWMatrix(
            f"no W-Matrix leads from {source.name} to {target.name}",
            found=Registry(tuple(from_source)) if from_source else self,
            expected="one for these exact weights"
            + ("" if has_text else " that reads no text (`awareness fit --without-text`)"),
            remedy="fit one with `awareness fit` and give it with --wmatrix FILE, or look for a "
            "route through other models with `awareness path`",
        )

    def find_for(self, manifest: Manifest, target: Geometry) -> WMatrixEntry:
        """The map that serves a package on another model; of a latent it is the one that made it.

        Raises:
            NoWMatrix: it is not among these, nor among `more`. RegistryError.
        """
        latent, source = manifest.latent, manifest.geometry
        if latent is None:
            return self.find(source, target, manifest.has_text)
        if not latent.target.same_model(target):
            if error := self._only_tokenizers_differ(source, target):
                raise error
            raise NoWMatrix(
                f"the latent was made for {latent.target.name}, not for {target.name}",
                found=latent.target.identity,
                expected=target.identity,
                remedy=f"use the package that it was made of, {latent.package}, or export its "
                "latent for this model",
            )
        for entry in self.entries:
            if entry.made(latent) and entry.leads(source, target):
                return entry
        if self.more and (found := self.more.find(source, target, True, latent)):
            return found
        from_source = [f"{e} {e.tensors[:12]}" for e in self.entries if e.leads(source, target)]
        raise NoWMatrix(
            f"the W-Matrix that made the latent, from {source.name} to {target.name}, is not here",
            found=", ".join(from_source) or str(self),
            expected=f"a map whose tensors have the digest {latent.wmatrix[:12]}…",
            remedy=f"give that .wmatrix file, or use the package that it was made of, "
            f"{latent.package}",
        )

    def _only_tokenizers_differ(self, source: Geometry, target: Geometry) -> NoWMatrix | None:
        """The error where nothing but a tokenizer.json, written again by another version or by
        hand, keeps a model from being the one of a memory or of a map."""
        pairs = [(source, target, "the memory's model and the served one")]
        for entry in self.entries:
            ends = (entry.manifest.source, source), (entry.manifest.target, target)
            if all(known.same_weights(model) for known, model in ends):
                pairs += [(*end, f"the models of the W-Matrix {entry} and these") for end in ends]
        for known, model, which in pairs:
            if known.same_weights(model) and known.tokenizer != model.tokenizer:
                return NoWMatrix(
                    f"the weights of {which} agree, only tokenizer.json differs",
                    found=model.identity,
                    expected=known.identity,
                    remedy="put the same tokenizer.json into both model folders (saving a model "
                    "writes it in another form), or capture and fit with the one that is served",
                )
        return None

    def model(self, model: str | Path) -> Geometry | None:
        """A model by its folder or by its name in the maps; None for an unknown name.

        Raises:
            BadInput: several models have the name.
            UnsupportedModel: the folder of a model whose cache cannot be described.
        """
        if is_model_folder(model):
            return geometry_of(model)
        matches = [geometry for geometry in self.models() if geometry.name == str(model)]
        if len(matches) > 1:
            raise BadInput(
                f"{len(matches)} models of the W-Matrices are named {str(model)!r}",
                found=self,
                expected="the name of one model",
                remedy="give the model's folder",
            )
        return matches[0] if matches else None

    def models(self) -> list[Geometry]:
        """The models that maps lead from and to, each once."""
        models: list[Geometry] = []
        for entry in self.entries:
            for model in (entry.manifest.source, entry.manifest.target):
                if not any(model.same_model(other) for other in models):
                    models.append(model)
        return models


def locate(wmatrix: str | Path) -> Path:
    """The file of a W-Matrix, by its path or by its name under `$AWARENESS_HOME/wmatrices`, with or
    without `.wmatrix`. A path that is neither is returned unchanged."""
    path = Path(wmatrix)
    registered = wmatrices_dir() / f"{path.name.removesuffix('.wmatrix')}.wmatrix"
    by_name = path.name == str(path) and not path.is_file() and registered.is_file()
    return registered if by_name else path
