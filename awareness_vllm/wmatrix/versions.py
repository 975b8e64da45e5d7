"""Versions of a name: `NAME.v1`, `NAME.v2` and so on, which stay, and `NAME`, the newest."""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from awareness_vllm.errors import ArtefactNotFound, RegistryError
from awareness_vllm.oci.artefact import MANIFEST
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import look, push
from awareness_vllm.wmatrix.listing import WMatrixListing, artefact_of

ATTEMPTS = 10
PATIENCE = 2.0
"""Seconds for which one who has claimed a number waits for another one to go on to the next."""
FAR = 1000
"""Numbers beyond the newest version that claims are believed for: anyone may claim any."""


def push_version(path: Path, name: str, repository: Repository) -> str:
    """Push a W-Matrix as the newest version of a name; the version's tag, `NAME.v1` and so on,
    which stays. The tag `NAME` is that of the newest.

    No request of a registry writes a tag only where there is none. So whoever wants a number claims
    it first, by a tag that nobody else writes, and then looks at the claims: of two, the later one
    sees the earlier, however long either stands still between its requests. Numbers that nobody
    took in the end are left out.

    Raises:
        WMatrixCorrupt, RegistryError; RegistryError also where others move the version's tag, who
            claim nothing: the map is pushed, and stays under its own tag.
    """
    artefact = artefact_of(path, name=name)
    listing = WMatrixListing.model_validate_json(artefact.config)
    # Bytes first: between the question for a number and its use there is no transfer.
    own = push(repository, artefact, (listing.tag,))
    claims = _Claims(repository, name, artefact.document)
    for _ in range(ATTEMPTS):
        newest, version = _newest(repository, name)
        if version is None or _files(repository, version) != [listing.digest]:
            number = claims.newest(newest) + 1
            version = f"{name}.v{number}"
            if not claims.take(number, version):
                continue
            repository.put_manifest(artefact.document, MANIFEST, version)
            _pause()
            if repository.manifest(version)[0].digest != own.digest:
                continue  # moved by one who claims nothing
        _name_newest(repository, name, listing.tag)
        return version
    raise _contested(repository, name, listing.tag)


@dataclass(frozen=True)
class _Claims:
    """The claims to numbers of a name, one pusher's among them. Each is a tag: a digest of the
    name, the number and digits that are one pusher's alone; of no other use."""

    repository: Repository
    name: str
    document: bytes
    own: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def prefix(self) -> str:
        return f"sha256-{hashlib.sha256(self.name.encode()).hexdigest()}."

    def read(self) -> dict[str, set[int]]:
        """The numbers that each pusher has claimed."""
        claims: defaultdict[str, set[int]] = defaultdict(set)
        for tag in self.repository.tags(self.prefix, internal=True):
            claim = tag.removeprefix(self.prefix)
            if len(claim) == 32:
                claims[claim[16:]].add(int(claim[:16], 16))
        return claims

    def newest(self, version: int) -> int:
        """The highest number that anybody has claimed, or that of the newest version."""
        claimed = {number for numbers in self.read().values() for number in numbers}
        return max(number for number in {version, *claimed} if number <= version + FAR)

    def take(self, number: int, version: str) -> bool:
        """Claim a number; whether it is this pusher's alone, and nobody's version yet.

        Of several that see each other, all but the first in order go on to higher numbers; the
        first waits a little until they have, since one of them may have looked before it came.
        """
        tag = f"{self.prefix}{number:016x}{self.own}"
        self.repository.put_manifest(self.document, MANIFEST, tag)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            claims = self.read()
            rivals = {p for p, n in claims.items() if number in n and max(n) == number} - {self.own}
            # After the claims: whoever went on may have made this version before.
            if _exists(self.repository, version) or (rivals and min(rivals) < self.own):
                return False
            if not rivals:
                return True
            _pause()
        return False


def _newest(repository: Repository, name: str) -> tuple[int, str | None]:
    """The number and the tag of a name's newest version; 0 and None without any."""
    numbers = {
        int(number): tag
        for tag in repository.tags(f"{name}.v")
        if (number := tag.removeprefix(f"{name}.v")).isdecimal()
    }
    newest = max(numbers, default=0)
    return newest, numbers.get(newest)


def _name_newest(repository: Repository, name: str, tag: str) -> None:
    """Have a name be that of its newest version, also of one that came meanwhile."""
    for _ in range(ATTEMPTS):
        _, version = _newest(repository, name)
        assert version is not None  # this one's
        try:
            descriptor, raw = repository.manifest(version)
        except ArtefactNotFound:  # a registry may list a tag that it is about to write
            _pause()
            continue
        repository.put_manifest(raw, descriptor.media_type, name)
        if _newest(repository, name)[1] == version:
            return
    raise _contested(repository, name, tag)


def _pause() -> None:
    """Time for whoever has claimed the same number at the same moment to go on."""
    time.sleep(random.uniform(0.05, 0.15))


def _contested(repository: Repository, name: str, tag: str) -> RegistryError:
    return RegistryError(
        f"{repository.reference} does not keep the versions of {name}",
        found="a tag that others move",
        expected="tags that stay once they are written",
        remedy=f"register it again; the map itself is pushed, as {tag}",
    )


def _exists(repository: Repository, tag: str) -> bool:
    try:
        repository.manifest(tag)
    except ArtefactNotFound:
        return False
    return True


def _files(repository: Repository, tag: str) -> list[str]:
    """The digests, in hex, of the files that a tag names; none of one that is about to be
    written."""
    try:
        return [layer.hex for layer in look(repository, tag).manifest.layers]
    except ArtefactNotFound:
        return []
