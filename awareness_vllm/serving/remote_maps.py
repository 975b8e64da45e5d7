"""Maps from a registry, pulled before vLLM starts: its workers load maps as they start."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import AwarenessError, BadInput
from awareness_vllm.files import wmatrices_dir
from awareness_vllm.marketplace.files import find, pull
from awareness_vllm.marketplace.maps import RepositoryMaps
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.deadline import deadline_at
from awareness_vllm.oci.reference import SCHEME, Reference
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.trust import trust_of, trusted_maps
from awareness_vllm.trust.policy import TrustPolicy
from awareness_vllm.wmatrix.listing import WMatrixListing, listing_of
from awareness_vllm.wmatrix.registry import Registry

logger = logging.getLogger(__name__)

MAX_MAPS = 8
"""Source models whose maps come from the registry unasked: each takes memory of the server's."""
MAX_TRIED = 64
"""Source models whose maps are looked for: those that no trusted key has signed do not come, though
they may be listed as the best."""
MAPS_S = 300.0
"""Seconds that a start takes for maps that nobody named; a transfer that did not end goes on at the
next one."""


def local_map(wmatrix: str | Path, trust: TrustPolicy) -> Path:
    """The file of a map by its path, or by an `oci://` reference, which is pulled.

    Raises:
        BadInput: no such file, or not a reference with a tag or a digest.
        ArtefactNotFound, ArtefactCorrupt, WMatrixCorrupt, SignatureInvalid, RegistryError
    """
    if str(wmatrix).startswith(SCHEME):
        reference = Reference.parse(wmatrix)
        if reference.name is None:
            raise BadInput(
                "a map's reference names one artefact",
                found=wmatrix,
                expected=f"{SCHEME}HOST/REPOSITORY:TAG",
            )
        repository = open_repository(reference)
        found, _ = find(repository, reference.name)
        listing_of(found)  # no memory, that is
        return pull(repository, found, wmatrices_dir(), trust=trust).path
    path = Path(wmatrix)
    if not path.is_file():
        raise BadInput(
            "no such W-Matrix",
            found=str(path),
            expected="a .wmatrix file",
            remedy="`awareness fit`",
        )
    return path


def with_registry_maps(config: ServingConfig, model: str) -> ServingConfig:
    """The configuration with further maps to a model, from its registry: the best certified one for
    each source model that no given map serves.

    Where the registry cannot be asked, does not end within MAPS_S, or vLLM alone finds the model,
    there are none, or fewer: what is here is served all the same.
    """
    if config.registry is None:
        return config
    paths: list[str] = []
    end = time.monotonic() + MAPS_S
    try:
        trust = trust_of(config)
        target, given = geometry_of(resolve_folder(model)), trusted_maps(config, trust)
        maps = RepositoryMaps(open_repository(config.registry), trust, pull=True)
        with deadline_at(lambda: end):
            for source in _unserved(maps.to(target), target, given):
                if len(paths) == MAX_MAPS:
                    logger.warning("the registry has more maps: name those you want by --wmatrix")
                    break
                if (path := _pulled(maps, source, target)) is not None:
                    paths.append(path)
    except AwarenessError as error:
        logger.warning("no maps come from the registry: %s", error)
    return config.model_copy(update={"wmatrices": (*config.wmatrices, *paths)})


def _unserved(
    listings: list[WMatrixListing], target: Geometry, given: Registry
) -> Iterator[Geometry]:
    """The source models of certified maps, each once, that no given one serves; the first MAX_TRIED
    of them."""
    sources: list[Geometry] = []
    for listing in listings:
        source = listing.manifest.source
        served = any(entry.leads(source, target) for entry in given.usable(has_text=True))
        known = any(source.same_model(other) for other in sources)
        if served or known or listing.manifest.certificate is None:
            continue
        if len(sources) == MAX_TRIED:
            logger.warning("maps from more than %d models are not looked for", MAX_TRIED)
            return
        sources.append(source)
        yield source


def _pulled(maps: RepositoryMaps, source: Geometry, target: Geometry) -> str | None:
    """The file of the best map between two models; None where it cannot be used."""
    try:
        entry = maps.find(source, target, has_text=True)
    except AwarenessError as error:
        logger.warning("no map from %s comes from the registry: %s", source.name, error)
        return None
    if entry is None:
        return None
    logger.warning("%s comes from the registry", entry)
    return str(entry.path.absolute())
