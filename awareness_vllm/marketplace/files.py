"""Memories and W-Matrices as artefacts: what is pushed of a file, and what is pulled into one."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from awareness_vllm.errors import ArtefactCorrupt, BadInput
from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.marketplace.licenses import canonical_license
from awareness_vllm.marketplace.signatures import (
    candidates,
    carry_signatures,
    choose,
    not_signed,
    push_signatures,
    roles_of,
)
from awareness_vllm.oci.artefact import MANIFEST, Artefact, Descriptor, descriptor_of
from awareness_vllm.oci.cache import Cache, check_draft
from awareness_vllm.oci.download import storage_full
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.oci.transfer import Found, look, push
from awareness_vllm.packages import listing as package_listing
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import MEMORY_ID
from awareness_vllm.tensor_file import is_whole
from awareness_vllm.trust.policy import Signers, TrustPolicy
from awareness_vllm.wmatrix import listing as wmatrix_listing
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing

NO_TRUST = TrustPolicy()
ID = re.compile(rf"{MEMORY_ID.pattern}|pair_[0-9a-f]{{32}}\.[0-9a-f]{{16}}")
"""The tags that are listings' own."""
LONGEST_NAME = 100
"""Bytes of a file's name; digests and suffixes are added."""


def push_file(
    path: Path,
    repository: Repository,
    *,
    tags: Sequence[str] = (),
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
    progress: Progress = no_progress,
) -> tuple[Listing, Descriptor]:
    """Push a package or a W-Matrix: its listing, and the descriptor of its manifest. A memory is
    tagged with its ID, a map with `WMatrixListing.tag`, and both with `tags`. The signatures beside
    it are pushed, too.

    Raises:
        PackageCorrupt, WMatrixCorrupt, RegistryError; BadInput: another kind of file or another
        file's ID for a tag, or a folder that is no layout and holds other files;
        SignatureInvalid: one beside it that cannot be read.
    """
    for tag in tags:
        repository.reference.at(tag)  # what can be no tag is an error before anything is pushed
    facts = {"name": name, "description": description, "license": license}
    artefact = artefact_of(path, **facts)
    listing = listing_in(artefact)
    for tag in tags:
        if ID.fullmatch(tag) and tag != listing.tag:
            raise BadInput(
                f"{path.name} cannot have this tag",
                found=f"the ID of another file, {tag}",
                expected=f"a name of yours; {listing.tag} it is tagged with anyway",
            )
    # Nobody sees the file before its signatures, which may refer to what is not there yet.
    subject = descriptor_of(artefact.document, MANIFEST)
    carry_signatures(repository, listing.tag, subject)
    push_signatures(repository, path, listing, subject)
    return listing, push(repository, artefact, (listing.tag, *tags), progress)


def artefact_of(path: Path, **facts: str | None) -> Artefact:
    """The artefact of a file, by its suffix; the `license` in its canonical form. Raises
    PackageCorrupt, WMatrixCorrupt, BadInput."""
    if (license := facts.get("license")) is not None:
        facts["license"] = canonical_license(license)
    try:
        match path.suffix:
            case ".safetensors":
                return package_listing.artefact_of(path, **facts)
            case ".wmatrix":
                return wmatrix_listing.artefact_of(path, **facts)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(
            f"{path.name} cannot be listed so",
            found=f"{first['loc'][0]}: {first['msg']}",
            expected="a name, a description and a license of one line each",
        ) from error
    raise BadInput(
        f"{path.name} is no file that a registry takes",
        found=f"the suffix {path.suffix!r}",
        expected="a memory package (.safetensors) or a W-Matrix (.wmatrix)",
    )


def listing_in(artefact: Artefact) -> Listing:
    """The listing in an artefact of ours."""
    kind = PackageListing if artefact.config_type == package_listing.CONFIG else WMatrixListing
    return kind.model_validate_json(artefact.config)


def listing_of(found: Found) -> Listing:
    """The listing in an artefact that was looked up. Raises ArtefactCorrupt: neither kind."""
    if found.manifest.config.media_type == wmatrix_listing.CONFIG:
        return wmatrix_listing.listing_of(found)
    return package_listing.listing_of(found)


def find(repository: Repository, name: str) -> tuple[Found, Listing]:
    """The artefact of an ID, a tag or a digest, with its listing; of the file itself nothing is
    read.

    Raises:
        ArtefactNotFound, RegistryError; ArtefactCorrupt: also an ID that is the tag of another
        file: whoever may push can move tags, and IDs are digests.
    """
    found = look(repository, name)
    what = listing_of(found)
    if ID.fullmatch(name) and what.tag != name:
        raise ArtefactCorrupt(
            f"the registry's artefact {name} cannot be used",
            found=f"the {'package' if isinstance(what, PackageListing) else 'W-Matrix'} {what.tag}",
            expected="the file of this ID",
            remedy="push the file of this ID again",
        )
    return found, what


def listing(repository: Repository, name: str) -> Listing:
    """The listing of an ID, a tag or a digest. Raises as `find` does."""
    return find(repository, name)[1]


@dataclass(frozen=True)
class Pulled:
    """A file that was pulled, and the names of the trusted keys that signed it."""

    path: Path
    listing: Listing
    signers: Signers


def pull_file(
    repository: Repository, name: str, folder: Path, progress: Progress = no_progress
) -> Path:
    """A package or W-Matrix in a folder; as `find` and `pull`."""
    found, _ = find(repository, name)
    return pull(repository, found, folder, progress=progress).path


def pull(
    repository: Repository,
    found: Found,
    folder: Path,
    *,
    trust: TrustPolicy = NO_TRUST,
    require_signed: bool = False,
    cache: Cache | None = None,
    progress: Progress = no_progress,
) -> Pulled:
    """Pull a package or W-Matrix, and its signatures, into a folder, under its ID or its listed
    name: checked as every file of a stranger's is, and in place only then. A file that is there
    stays: of another W-Matrix the name is made longer.

    Args:
        require_signed: whether a key of the trust file must have signed it.
        cache: where it is kept besides; by default the one of this home.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, PackageCorrupt, WMatrixCorrupt, RegistryError,
        StorageFull; SignatureInvalid: before anything of the file is pulled.
    """
    what = listing_of(found)
    folder.mkdir(parents=True, exist_ok=True)
    path, there = destination(folder, what)
    with scratch_folder(folder) as scratch:
        signed = candidates(repository, found.descriptor.digest, what, trust)
        signers = choose(what, signed, path, scratch, trust)
        role = roles_of(what)[0]
        if require_signed and getattr(signers, role) is None:
            raise not_signed(what, role)
        beside = list(scratch.iterdir())
        draft = scratch / path.name
        if there:
            check_file(what, path)
        else:
            _bring(repository, found, what, draft, cache or Cache(), progress)
        # A file is never seen without its signature.
        for signature in beside:
            put_in_place(signature, folder / signature.name)
        if not there:
            put_in_place(draft, path, name_durable=False)
    return Pulled(path, what, signers)


def destination(folder: Path, what: Listing) -> tuple[Path, bool]:
    """Where a file goes, and whether it is there."""
    if isinstance(what, PackageListing):
        path = folder / f"{what.id}.safetensors"
        return path, is_whole(path.resolve(), what.digest)
    name = file_name(what.name)
    path = folder / f"{name}.wmatrix"
    if not path.exists() or is_whole(path.resolve(), what.digest):
        return path, path.exists()
    path = folder / f"{name}.{what.digest[:16]}.wmatrix"
    return path, is_whole(path.resolve(), what.digest)


def _bring(
    repository: Repository,
    found: Found,
    what: Listing,
    draft: Path,
    cache: Cache,
    progress: Progress,
) -> None:
    """Have a draft be the file of an artefact: its digest is right, and it is what was listed."""
    (layer,) = found.manifest.layers
    checked: list[Path] = []

    def check(path: Path) -> None:
        check_file(what, path)
        checked.append(path)

    if layer.size > cache.limit:
        with cache.draft(layer, progress) as partial:
            repository.fetch(layer, partial, progress)
            check_draft(partial, check)
            _link(partial, draft)
            partial.unlink()
        return
    name = cache_name(what)
    if (cached := cache.path(name)) and not is_whole(cached, what.digest):
        cache.remove(name)  # somebody wrote to it, or has removed it by now
    for last in (False, True):
        try:
            _link(cache.fetch(repository, layer, name, check=check, progress=progress), draft)
            break
        except FileNotFoundError:  # collected meanwhile, unless it is so again
            if last:
                raise
    if not checked:  # it was there, perhaps by another listing
        check(draft)


def _link(path: Path, draft: Path) -> None:
    """Give a file a second name, or a copy of it where a name cannot be given."""
    try:
        os.link(path, draft)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or one without hard links
        try:
            shutil.copyfile(path, draft)
        except OSError as error:
            raise storage_full(error, path.stat().st_size) from error


def cache_name(what: Listing) -> str:
    """The name of a file in the cache, which has its digest."""
    if isinstance(what, PackageListing):
        return f"{what.id}.safetensors"
    return f"{what.digest}.wmatrix"


def check_file(what: Listing, path: Path) -> None:
    """Check that a file is what was listed.

    Raises:
        ArtefactCorrupt, PackageCorrupt, WMatrixCorrupt
    """
    if path.stat().st_size != what.bytes:
        raise ArtefactCorrupt(
            f"{what.name} has another size than its listing says",
            found=f"{path.stat().st_size} bytes",
            expected=f"{what.bytes}",
        )
    what.check_file(path)


def file_name(name: str) -> str:
    """A listed name as that of a file."""
    plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return plain.encode()[:LONGEST_NAME].decode(errors="ignore").strip(".-") or "map"
