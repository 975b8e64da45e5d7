"""Memories and W-Matrices as artefacts: what is pushed of a file, and what is pulled into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from awareness_vllm.errors import ArtefactCorrupt, BadInput
from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.oci.artefact import Artefact, Descriptor
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.oci.transfer import Found, look, push
from awareness_vllm.packages import listing as package_listing
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix import listing as wmatrix_listing
from awareness_vllm.wmatrix.listing import WMatrixListing

Listing = PackageListing | WMatrixListing


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
    tagged with its ID, a map with `WMatrixListing.tag`, and both with `tags`.

    Raises:
        PackageCorrupt, WMatrixCorrupt, RegistryError; BadInput: another kind of file.
    """
    facts = {"name": name, "description": description, "license": license}
    artefact = artefact_of(path, **facts)
    listing = listing_in(artefact)
    own = listing.id if isinstance(listing, PackageListing) else listing.tag
    return listing, push(repository, artefact, (own, *tags), progress)


def artefact_of(path: Path, **facts: str | None) -> Artefact:
    """The artefact of a file, by its suffix. Raises PackageCorrupt, WMatrixCorrupt, BadInput."""
    match path.suffix:
        case ".safetensors":
            return package_listing.artefact_of(path, **facts)
        case ".wmatrix":
            return wmatrix_listing.artefact_of(path, **facts)
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


def listing(repository: Repository, name: str) -> Listing:
    """The listing of an ID, a tag or a digest; of the file itself nothing is read.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, RegistryError
    """
    return listing_of(look(repository, name))


def pull_file(
    repository: Repository, name: str, folder: Path, progress: Progress = no_progress
) -> Path:
    """A package or W-Matrix in a folder, under its ID or its listed name: checked as every file of
    a stranger's is, and in place only then.

    Raises:
        ArtefactNotFound, ArtefactCorrupt, PackageCorrupt, WMatrixCorrupt, RegistryError
    """
    found = look(repository, name)
    what = listing_of(found)
    (layer,) = found.manifest.layers
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(what, PackageListing):
        path = folder / f"{what.id}.safetensors"
    else:
        path = folder / f"{file_name(what.name)}.wmatrix"
    with scratch_folder(folder) as scratch:
        draft = scratch / path.name
        repository.fetch(layer, draft, progress)
        check_file(what, draft)
        put_in_place(draft, path)
    return path


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
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).strip(".-") or "map"
