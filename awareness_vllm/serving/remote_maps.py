"""Maps from a registry, pulled before vLLM starts: its workers load maps as they start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from awareness_vllm.errors import AwarenessError, BadInput
from awareness_vllm.files import home, put_in_place, scratch_folder
from awareness_vllm.marketplace.files import file_name
from awareness_vllm.marketplace.maps import RemoteMaps
from awareness_vllm.marketplace.signatures import choose, signatures
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.oci.cache import Cache
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import SCHEME, Reference
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look
from awareness_vllm.serving.config import ServingConfig
from awareness_vllm.serving.trust import trust_of, trusted_maps
from awareness_vllm.trust.policy import TrustPolicy, signature_path
from awareness_vllm.wmatrix.listing import WMatrixListing, listing_of
from awareness_vllm.wmatrix.registry import Registry

logger = logging.getLogger(__name__)

MAX_MAPS = 8
"""Source models whose maps come from the registry unasked: each takes memory of the server's."""


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
        return pull_map(open_repository(reference), reference.name, trust)
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
    """The configuration with further maps to a model from its registry: for each source model that
    no given map serves, the best that is certified, and signed where that must be.

    A registry that cannot be asked, or a model that only vLLM finds, gives none: what there is
    locally is served all the same.
    """
    if config.registry is None:
        return config
    try:
        trust = trust_of(config)
        target, given = geometry_of(resolve_folder(model)), trusted_maps(config, trust)
        repository = open_repository(config.registry)
        listings = RemoteMaps(repository, trust).to(target)
        paths = [
            str(pull_map(repository, listing.tag, trust))
            for listing in _missing(listings, target, given)
        ]
        more = config.model_copy(update={"wmatrices": (*config.wmatrices, *paths)})
        trusted_maps(more, trust)
        return more
    except AwarenessError as error:
        logger.warning("no further maps come from the registry: %s", error)
        return config


def _missing(
    listings: list[WMatrixListing], target: Geometry, given: Registry
) -> Iterator[WMatrixListing]:
    """The first certified map of each source that no given one serves."""
    sources: list[Geometry] = []
    for listing in listings:
        source = listing.manifest.source
        served = any(entry.leads(source, target) for entry in given.usable(has_text=True))
        known = any(source.same_model(other) for other in sources)
        if served or known or listing.certificate is None:
            continue
        if len(sources) == MAX_MAPS:
            logger.warning("the registry has further maps: name those you want with --wmatrix")
            return
        sources.append(source)
        yield listing


def pull_map(repository: Repository, name: str, trust: TrustPolicy) -> Path:
    """The file of a map in a repository, pulled unless it is there, its signatures beside it.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, WMatrixCorrupt, SignatureInvalid, RegistryError
    """
    found = look(repository, name)
    listing = listing_of(found)
    (layer,) = found.manifest.layers
    # A folder for each map: its file keeps its name, which reports show.
    cache = Cache(home() / "cache" / "wmatrices" / listing.digest[:32], limit=layer.size)
    path = cache.fetch(
        repository, layer, f"{file_name(listing.name)}.wmatrix", check=listing.check_file
    )
    with scratch_folder(cache.folder) as scratch:
        choose(listing, signatures(repository, found.descriptor.digest), path, scratch, trust)
        for role in ("wmatrix", "certificate"):
            if (draft := signature_path(scratch / path.name, role)).is_file():
                put_in_place(draft, signature_path(path, role))
    return path
