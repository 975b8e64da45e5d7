"""Versions of a name: `NAME.v1`, `NAME.v2` and so on, which stay, and `NAME`, the newest."""

from __future__ import annotations

import random
import time
from pathlib import Path

from awareness_vllm.errors import RegistryError
from awareness_vllm.oci.artefact import MANIFEST
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look, push
from awareness_vllm.wmatrix.listing import WMatrixListing, artefact_of

ATTEMPTS = 10


def push_version(path: Path, name: str, repository: Repository) -> str:
    """Push a W-Matrix as the newest version of a name; the version's tag, `NAME.v1` and so on,
    which stays. The tag `NAME` is that of the newest.

    Two that push at once may take one number, whose tag is then the later one's. So each looks at
    it again, a moment later, and the other one takes the next.

    Raises:
        WMatrixCorrupt, RegistryError
    """
    artefact = artefact_of(path, name=name)
    listing = WMatrixListing.model_validate_json(artefact.config)
    # Bytes first: between the question for a number and its use there is no transfer.
    own = push(repository, artefact, (listing.tag,))
    for _ in range(ATTEMPTS):
        newest, version = _newest(repository, name)
        if version is None or _files(repository, version) != [listing.digest]:
            version = f"{name}.v{newest + 1}"
        repository.put_manifest(artefact.document, MANIFEST, version)
        _pause()
        if repository.manifest(version)[0].digest == own.digest:
            _name_newest(repository, name)
            return version
    raise _contested(repository, name)


def _newest(repository: Repository, name: str) -> tuple[int, str | None]:
    """The number and the tag of a name's newest version; 0 and None without any."""
    numbers = {
        int(number): tag
        for tag in repository.tags(f"{name}.v")
        if (number := tag.removeprefix(f"{name}.v")).isdecimal()
    }
    newest = max(numbers, default=0)
    return newest, numbers.get(newest)


def _name_newest(repository: Repository, name: str) -> None:
    """Have a name be that of its newest version, also of one that came meanwhile."""
    for _ in range(ATTEMPTS):
        _, version = _newest(repository, name)
        assert version is not None  # this one's
        descriptor, raw = repository.manifest(version)
        repository.put_manifest(raw, descriptor.media_type, name)
        if _newest(repository, name)[1] == version:
            return
    raise _contested(repository, name)


def _pause() -> None:
    """Time for whoever has asked for a number at the same moment to use it."""
    time.sleep(random.uniform(0.05, 0.15))


def _contested(repository: Repository, name: str) -> RegistryError:
    return RegistryError(
        f"{repository.reference} does not keep the versions of {name}",
        found="a tag that others move",
        remedy="register it again",
    )


def _files(repository: Repository, tag: str) -> list[str]:
    """The digests, in hex, of the files that a tag names."""
    return [layer.hex for layer in look(repository, tag).manifest.layers]
