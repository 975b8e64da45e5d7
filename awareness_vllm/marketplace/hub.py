"""Memories and W-Matrices in the layout of the Hugging Face hub: a repository's folder to upload,
and files out of the local hub cache. Nothing here talks to the hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput, escaped
from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.marketplace.card import card
from awareness_vllm.marketplace.files import (
    NO_TRUST,
    Pulled,
    artefact_of,
    destination,
    file_name,
    listing_in,
)
from awareness_vllm.marketplace.signatures import digest_for, roles_of
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import MEMORY_ID, corrupt_package
from awareness_vllm.tensor_file import FileRefused, opened
from awareness_vllm.trust.bundle import invalid_signature, parse_bundle
from awareness_vllm.trust.policy import Role, Signers, TrustPolicy, read_signature, signature_path
from awareness_vllm.wmatrix.listing import Listing

CHUNK = 1 << 20
CARD = "README.md"
ATTRIBUTES = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n" + (
    "*.wmatrix filter=lfs diff=lfs merge=lfs -text\n"
)
"""A repository's `.gitattributes`: what git-lfs stores."""
REPOSITORY = re.compile(r"(model|dataset)s--(.+)")
"""The name of a repository's folder in the hub's cache."""
MODEL = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
SUFFIXES = (".safetensors", ".wmatrix")


@dataclass(frozen=True)
class Exported:
    """A folder as a repository on the hub has it, and the names of its files."""

    folder: Path
    listing: Listing
    files: tuple[str, ...]


def export_folder(
    path: Path,
    folder: Path,
    *,
    base_models: Sequence[str] = (),
    name: str | None = None,
    description: str | None = None,
    license: str | None = None,
) -> Exported:
    """A package or a W-Matrix as a repository's folder: the card, the file, its signatures and
    `.gitattributes`. The folder must be new or empty; it is there as a whole, or not at all.

    Args:
        base_models: the source and the target, by their names on the hub.

    Raises:
        BadInput: another kind of file, a name or license that cannot be one, or a folder with
            something in it.
        PackageCorrupt, WMatrixCorrupt; SignatureInvalid: a signature beside it is not of this file.
    """
    if wrong := [model for model in base_models if not MODEL.fullmatch(model)]:
        raise BadInput(
            "not a model's name on the hub", found=ascii(wrong[0])[:80], expected="OWNER/NAME"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(
            f"{folder} cannot be exported into",
            found="a folder with files in it" if folder.is_dir() else "a file",
            expected="a new or an empty folder",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as scratch:
        draft = scratch / "repository"
        draft.mkdir()
        copy = draft / (file_name(path.stem) + path.suffix)
        _copy(path if path.suffix == ".safetensors" else path.resolve(), copy)
        facts = {"name": name, "description": description, "license": license}
        listing = listing_in(artefact_of(copy, **facts))
        _check_name(path, listing)
        if isinstance(listing, PackageListing):
            copy = copy.rename(copy.with_stem(listing.id))
        signatures = dict(_signatures(path, copy, listing))
        text = card(listing, copy.name, signatures, base_models=base_models)
        (draft / CARD).write_text(text, encoding="utf-8")
        (draft / ".gitattributes").write_text(ATTRIBUTES, encoding="utf-8")
        files = tuple(sorted(file.name for file in draft.iterdir()))
        os.replace(draft, folder)
    return Exported(folder, listing, files)


def is_hub_folder(path: Path) -> bool:
    """Whether a path is a repository of the hub's cache, or a folder as `export_folder` writes
    it; a layout folder is neither."""
    if not path.is_dir() or (path / "oci-layout").exists():
        return False
    return REPOSITORY.fullmatch(path.name) is not None or bool(_files(path))


def pull_folder(
    path: Path,
    store: Path,
    wmatrices: Path,
    *,
    trust: TrustPolicy = NO_TRUST,
    require_signed: bool = False,
) -> list[Pulled]:
    """The packages and W-Matrices of a hub cache's repository, of one of its snapshots, or of an
    exported folder, copied with their signatures into a store and a folder of maps.

    Links are followed only into the cache's own blobs. Each file is checked as a stranger's, and in
    place only then; as `pull` does, it leaves other files where they are.

    Raises:
        ArtefactNotFound: no such files, or no snapshot of the repository's main branch.
        PackageCorrupt, WMatrixCorrupt, ArtefactCorrupt, SignatureInvalid
    """
    folder = _snapshot(path)
    found = _files(folder)
    if not found:
        raise ArtefactNotFound(
            f"there is nothing to pull in {escaped(str(folder))}",
            found="no such file",
            expected="*.safetensors of memories, or *.wmatrix",
        )
    pulled = []
    for file in found:
        into = store if file.suffix == ".safetensors" else wmatrices
        into.mkdir(parents=True, exist_ok=True)
        with scratch_folder(into) as scratch:
            pulled.append(_pull(file, into, scratch, trust, require_signed))
    return pulled


def _pull(file: Path, into: Path, scratch: Path, trust: TrustPolicy, require: bool) -> Pulled:
    """One file with its signatures, checked and put into a folder."""
    copy = scratch / f"copy{file.suffix}"
    _copy(_own(file), copy)
    name = file_name(file.stem) if file.suffix == ".wmatrix" else None
    listing = listing_in(artefact_of(copy, name=name))
    _check_name(file, listing)
    path, there = destination(into, listing)
    draft = copy.rename(scratch / path.name)
    signers: dict[str, str | None] = {}
    for role, digest in _digests(listing):
        beside = signature_path(file, role)
        if beside.exists():
            _copy(_own(beside), signature_path(draft, role))
        needed = require and role != "certificate"
        signers[role] = (trust.require if needed else trust.signer)(draft, digest, role)
    if there:
        draft.unlink()
    # A file is never seen without its signature.
    for part in sorted(scratch.iterdir(), key=lambda part: part == draft):
        put_in_place(part, into / part.name)
    return Pulled(path, listing, Signers(**signers))


def _snapshot(path: Path) -> Path:
    """The folder of a repository's files."""
    if (named := REPOSITORY.fullmatch(path.name)) is None:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                named[2].replace("--", "/"),
                repo_type=named[1],
                cache_dir=path.parent,
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise ArtefactNotFound(
            f"{escaped(path.name)} has nothing of its main branch",
            found=str(error)[:200],
            expected="a repository that was downloaded whole",
            remedy="download it again, or give the folder of a revision in its snapshots/",
        ) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def _own(path: Path) -> Path:
    """The file that a path of a snapshot leads to: itself, or a blob of its repository.

    Raises:
        ArtefactCorrupt: a link that leads elsewhere.
    """
    if not path.is_symlink():
        return path
    real, repository = Path(os.path.realpath(path)), path.absolute().parent.parent.parent
    blobs = Path(os.path.realpath(repository / "blobs"))
    if REPOSITORY.fullmatch(repository.name) is None or not real.is_relative_to(blobs):
        raise ArtefactCorrupt(
            f"{escaped(path.name)} cannot be used",
            found="a link out of its repository",
            expected="a file, or a link to one of the hub cache's blobs",
            remedy="download the repository again",
        )
    return real


def _check_name(path: Path, listing: Listing) -> None:
    """Check that a package that is named by an ID has it. Raises PackageCorrupt."""
    named = MEMORY_ID.fullmatch(path.stem) is not None
    if isinstance(listing, PackageListing) and named and path.stem != listing.id:
        raise corrupt_package(path, f"its bytes are those of {listing.id}", path.stem)


def _digests(listing: Listing) -> Iterator[tuple[Role, str]]:
    """The roles in which a file can be signed, and the digest that is signed in each."""
    for role in roles_of(listing):
        if (digest := digest_for(listing, role)) is not None:
            yield role, digest


def _signatures(path: Path, copy: Path, listing: Listing) -> Iterator[tuple[Role, str]]:
    """Copy the signatures of a file beside its copy: each role, and its key's fingerprint."""
    for role, digest in _digests(listing):
        if (document := read_signature(path, role)) is None:
            continue
        name = signature_path(path, role).name
        bundle = parse_bundle(document, name)
        if bundle.digest != digest:
            found = f"the signature of a file with sha256 {bundle.digest}"
            raise invalid_signature(name, found, f"sha256 {digest}")
        signature_path(copy, role).write_bytes(document)
        yield role, bundle.fingerprint


def _copy(source: Path, copy: Path) -> None:
    """Copy a regular file. Raises BadInput."""
    try:
        with opened(source) as (file, _), copy.open("wb") as out:
            shutil.copyfileobj(file, out, CHUNK)
    except FileRefused as error:
        raise BadInput(
            f"{escaped(source.name)} cannot be copied", found=error.found, expected=error.expected
        ) from error
