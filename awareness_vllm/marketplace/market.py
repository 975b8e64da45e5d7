"""`Marketplace`: the memories and W-Matrices of a registry, or of a layout folder.

There is no money in it and no ledger: whoever the registry lets in may pull.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from awareness_vllm.errors import ArtefactCorrupt, BadInput, NotAvailable
from awareness_vllm.files import default_store, wmatrices_dir
from awareness_vllm.marketplace.files import find, pull, push_file
from awareness_vllm.marketplace.index import LIMIT, ListingIndex, Wanted
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import is_model_folder
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.reference import Reference, default_registry
from awareness_vllm.oci.repository import Progress, Repository, no_progress
from awareness_vllm.oci.transfer import Found
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing
from awareness_vllm.wmatrix.registry import Registry

L = TypeVar("L", PackageListing, WMatrixListing)
MOST_TOKENS = 1 << 40


class Marketplace:
    """Memories and W-Matrices in a registry.

        market = Marketplace(url="oci://registry.example.com/team/memories", api_key="…")
        listing = market.memories.get("mem_…")  # manifest and config blob alone are read
        print(listing.name, listing.source_model, listing.token_count, listing.bytes)
        market.memories.pull(listing.id)

    Args:
        url: `oci://HOST/REPOSITORY` or a layout folder, by default `$AWARENESS_REGISTRY`, without
            that the folder `$AWARENESS_HOME/registry`.
        api_key: the registry's token, or "user:password"; by default docker's own configuration
            says how to log in. A folder needs none.
        wmatrices: the maps at hand, by which a search knows what a target can use: a registry, or
            files and folders, by default `$AWARENESS_HOME/wmatrices`.

    Raises:
        BadInput: not a reference, or one with a tag.
    """

    def __init__(
        self,
        url: str | Path | None = None,
        api_key: str | None = None,
        *,
        wmatrices: Registry | Sequence[str | Path] | None = None,
    ) -> None:
        reference = Reference.parse(url or default_registry())
        if reference.name is not None:
            raise BadInput(
                "a marketplace is a whole repository",
                found=str(reference),
                expected="a reference without tag and digest",
            )
        self.repository = open_repository(reference, api_key=api_key)
        index = ListingIndex(self.repository)
        self.memories = Memories(self.repository, index, wmatrices)
        self.wmatrices = WMatrices(self.repository, index)

    @property
    def vectors(self) -> NoReturn:
        """Raises NotAvailable: there are no vector packages yet."""
        raise NotAvailable(
            "there are no vector packages yet",
            found="market.vectors",
            expected="market.memories or market.wmatrices",
            remedy="use a memory package, which carries a text from one model to another",
        )


class Shelf(ABC, Generic[L]):
    """The listings of one kind, and the files behind them."""

    kind: type[L]
    suffix: str

    def __init__(self, repository: Repository, index: ListingIndex) -> None:
        self.repository, self.index = repository, index

    def get(self, id: str) -> L:
        """The listing of an ID, a tag or a digest ("sha256:…"); of the file itself nothing is read.

        Raises:
            ArtefactNotFound; ArtefactCorrupt: also another kind of artefact; RegistryDenied: the
                registry shows its listings to others only; RegistryError.
        """
        return self._find(id)[1]

    def pull(self, id: str, folder: Path | None = None, progress: Progress = no_progress) -> Path:
        """The file of an ID, a tag or a digest, checked and in place.

        Args:
            folder: by default the store, or `$AWARENESS_HOME/wmatrices`, where it is found by name.

        Raises:
            PackageCorrupt, WMatrixCorrupt, and as of `get`.
        """
        found, _ = self._find(id)
        return pull(self.repository, found, folder or self.folder(), progress=progress).path

    def publish(
        self,
        path: str | Path,
        name: str | None = None,
        description: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        progress: Progress = no_progress,
    ) -> L:
        """Push a file; its listing.

        Args:
            name: for people, by default the name in the file.
            license: an SPDX expression, or a name of the Hugging Face hub.
            tags: further names to get it by.

        Raises:
            PackageCorrupt, WMatrixCorrupt, RegistryDenied, RegistryError; BadInput: another kind of
                file, or a name, license or tag that cannot be one.
        """
        if Path(path).suffix != self.suffix:
            raise BadInput(
                "another kind of file is published here",
                found=Path(path).name,
                expected=f"a file {self.suffix}",
            )
        facts = {"name": name, "description": description, "license": license}
        pushed, _ = push_file(Path(path), self.repository, tags=tags, progress=progress, **facts)
        return self._own(pushed)

    @abstractmethod
    def folder(self) -> Path:
        """Where files are pulled to by default."""

    def _find(self, id: str) -> tuple[Found, L]:
        if not isinstance(id, str):
            raise BadInput(
                "not what a listing is found by",
                found=f"{type(id).__name__} {id!r}"[:200],
                expected="an ID, a tag or a digest, such as listing.id",
            )
        found, what = find(self.repository, id)
        return found, self._own(what)

    def _own(self, listing: Listing) -> L:
        if not isinstance(listing, self.kind):
            raise ArtefactCorrupt(
                f"{listing.name} is another kind of artefact",
                found=type(listing).__name__,
                expected=self.kind.__name__,
                remedy="look for it among market.wmatrices or market.memories",
            )
        return listing

    def _search(self, wanted: Wanted, limit: int, refresh: bool) -> list[L]:
        return [self._own(listing) for listing in self.index.search(wanted, limit, refresh)]


class Memories(Shelf[PackageListing]):
    """Memory packages."""

    kind, suffix = PackageListing, ".safetensors"

    def __init__(
        self,
        repository: Repository,
        index: ListingIndex,
        wmatrices: Registry | Sequence[str | Path] | None = None,
    ) -> None:
        super().__init__(repository, index)
        self._wmatrices = wmatrices

    def folder(self) -> Path:
        return default_store()

    def search(
        self,
        text: str | None = None,
        source_model: str | Path | None = None,
        target_model: str | Path | None = None,
        tokens: int | tuple[int, int] | None = None,
        limit: int = LIMIT,
        refresh: bool = False,
    ) -> list[PackageListing]:
        """The listings that match, at most `limit`: the best first where there is a text, else the
        newest.

        Args:
            text: words that all occur in name, description, ID or model; each may be cut short.
            source_model: the model that computed the states, by folder or name.
            target_model: a model that can use the memory: it is the source itself, or a W-Matrix in
                this repository or at hand leads there. By folder, or by its name in listings and
                maps.
            tokens: how many of the source model at most, or the least and the most.
            refresh: ask which file each tag names now; else those that were asked an hour ago.

        Raises:
            RegistryDenied, RegistryError; BadInput: tokens that are none, or the name of several
                models at hand; UnsupportedModel: a folder that cannot be used.
        """
        wanted = Wanted(
            "memory",
            text=text,
            source=None if source_model is None else model_key(source_model),
            tokens=token_range(tokens),
        )
        if target_model is not None:
            local = Registry.read(self._wmatrices)
            geometry = local.model(target_model)
            key = str(target_model) if geometry is None else geometry.fingerprint
            maps = (e.manifest for e in local.usable(has_text=True))
            at_hand = frozenset(m.source.fingerprint for m in maps if m.target.fingerprint == key)
            wanted = replace(wanted, target=key, sources=at_hand, readable=True)
        return self._search(wanted, limit, refresh)


class WMatrices(Shelf[WMatrixListing]):
    """W-Matrices."""

    kind, suffix = WMatrixListing, ".wmatrix"

    def folder(self) -> Path:
        return wmatrices_dir()

    def search(
        self,
        text: str | None = None,
        source_model: str | Path | None = None,
        target_model: str | Path | None = None,
        limit: int = LIMIT,
        refresh: bool = False,
    ) -> list[WMatrixListing]:
        """The listings that match, as of `Memories.search`: maps from one model to another.

        Raises:
            RegistryDenied, RegistryError; UnsupportedModel: a folder that cannot be used.
        """
        wanted = Wanted(
            "wmatrix",
            text=text,
            source=None if source_model is None else model_key(source_model),
            target=None if target_model is None else model_key(target_model),
        )
        return self._search(wanted, limit, refresh)


def model_key(model: str | Path) -> str:
    """What a search knows a model by: the fingerprint of a folder's geometry, else its name."""
    return geometry_of(model).fingerprint if is_model_folder(model) else str(model)


def token_range(tokens: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """The least and the most tokens. Raises BadInput."""
    if tokens is None:
        return None
    wanted = (0, tokens) if isinstance(tokens, int) else tokens
    match wanted:
        case (int(least), int(most)) if 0 <= least <= most <= MOST_TOKENS:
            return least, most
        case _:
            raise BadInput(
                "no range of tokens",
                found=repr(tokens),
                expected="how many at most, or the least and the most",
            )
