"""Memories and W-Matrices in the layout of the Hugging Face hub: a repository's folder to upload,
and files out of the local hub cache. Nothing here talks to the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, BadInput, escaped
from awareness_vllm.files import put_in_place, scratch_folder
from awareness_vllm.marketplace.card import card
from awareness_vllm.marketplace.files import artefact_of, file_name, listing_in
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.packages.manifest import MEMORY_ID, corrupt_package, id_of
from awareness_vllm.tensor_file import FileRefused, opened
from awareness_vllm.trust.bundle import invalid_signature, parse_bundle
from awareness_vllm.trust.policy import Role, TrustPolicy, read_signature, signature_path
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
        BadInput: another kind of file, a name that cannot be one, or a folder with something in it.
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
        try:
            listing = listing_in(artefact_of(copy, **facts))
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(map(str, fault["loc"]))
            raise BadInput(f"the {field} cannot be used", found=fault["msg"]) from error
        copy = _named(path, copy, listing)
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
    *,
    store: Path,
    wmatrices: Path,
    trust: TrustPolicy | None = None,
    require_signed: bool = False,
) -> list[Path]:
    """The packages and W-Matrices of a hub cache's repository, of one of its snapshots, or of an
    exported folder, copied with their signatures into a store and a folder of maps.

    Links are followed only into the cache's own blobs. Each file is checked as a stranger's, and in
    place only then: the paths are those of the files that are there.

    Raises:
        ArtefactNotFound: no such files, or no snapshot of the repository's main branch.
        PackageCorrupt, WMatrixCorrupt, ArtefactCorrupt, SignatureInvalid
        BadInput: another map of the same name is in the folder.
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
            pulled.append(_pull(file, into, scratch, trust or TrustPolicy(), require_signed))
    return pulled


def _pull(file: Path, into: Path, scratch: Path, trust: TrustPolicy, require: bool) -> Path:
    """One file with its signatures, checked and put into a folder."""
    copy = scratch / (file_name(file.stem) + file.suffix)
    _copy(_own(file), copy)
    listing = listing_in(artefact_of(copy))
    copy = _named(file, copy, listing)
    for role, digest in _roles(listing).items():
        beside = signature_path(file, role)
        if beside.exists():
            _copy(_own(beside), signature_path(copy, role))
        needed = require and role != "certificate"
        (trust.require if needed else trust.signer)(copy, digest, role)
    place = into / copy.name
    if place.exists() and listing_in(artefact_of(place)).digest != listing.digest:
        raise BadInput(
            f"there is another {place.name}",
            found=f"a file with another digest than {listing.digest}",
            expected="none of this name, or the same file",
            remedy="move the one that is there out of the way",
        )
    for draft in sorted(scratch.iterdir(), key=lambda draft: draft == copy):  # the file last
        put_in_place(draft, into / draft.name)
    return place


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


def _named(path: Path, copy: Path, listing: Listing) -> Path:
    """The copy of a file under the name that it has in a store or a folder of maps. Raises
    PackageCorrupt."""
    if not isinstance(listing, PackageListing):
        return copy
    if MEMORY_ID.fullmatch(path.stem) and path.stem != id_of(listing.digest):
        raise corrupt_package(path, f"its bytes are those of {listing.id}", path.stem)
    return copy.rename(copy.with_stem(listing.id))


def _roles(listing: Listing) -> dict[Role, str]:
    """The roles in which a file can be signed, and the digest that is signed in each."""
    if isinstance(listing, PackageListing):
        return {"package": listing.digest}
    roles: dict[Role, str] = {"wmatrix": listing.digest}
    if (statement := listing.manifest.certificate_statement) is not None:
        roles["certificate"] = hashlib.sha256(statement).hexdigest()
    return roles


def _signatures(path: Path, copy: Path, listing: Listing) -> Iterator[tuple[Role, str]]:
    """Copy the signatures of a file beside its copy: each role, and its key's fingerprint."""
    for role, digest in _roles(listing).items():
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
            while chunk := file.read(CHUNK):
                out.write(chunk)
    except FileRefused as error:
        raise BadInput(
            f"{escaped(source.name)} cannot be copied", found=error.found, expected=error.expected
        ) from error
