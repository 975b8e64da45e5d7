"""The cache: what was pulled, by names that come from digests, up to a limit of bytes.

A folder of its own, which servers and commands share:

    mem_….safetensors  ….wmatrix    what was pulled, each checked before it had this name
    NAME.sig …                      what lies beside a file, and goes with it
    NAME.used                       when it was used last; its own times stay, readers look at them
    partial/DIGEST                  what a download has brought so far, locked while it runs
    listings/                       what a search remembers of a registry
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from awareness_vllm.errors import AwarenessError, BadInput, StorageFull
from awareness_vllm.files import home
from awareness_vllm.oci.artefact import Descriptor
from awareness_vllm.oci.repository import Progress, Repository, no_progress

LIMIT = "AWARENESS_CACHE_GIB"
"""Environment variable: the cache's size in GiB."""
DEFAULT_LIMIT = 20.0
SUFFIXES = (".safetensors", ".wmatrix")
FRESH = 30.0
"""Seconds in which a file that was just used is not removed: it is on its way to whoever wants it.
"""
STALE = 3 * 86_400.0
"""Seconds after which nobody will go on with a part of a download."""
RESTAMP = 60.0
WAIT = 0.05

Check = Callable[[Path], None]


@dataclass(frozen=True)
class Collected:
    """What a collection has removed, and what is left, both in files and bytes.

    Files that a store has too (by hard links) take no room of the cache's: they count nowhere.
    """

    removed: int
    freed: int
    kept: int
    bytes: int


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: float
    partial: bool


class Cache:
    """A cache in a folder.

    Args:
        folder: by default `$AWARENESS_HOME/cache`.
        limit: bytes; by default those of `$AWARENESS_CACHE_GIB`, or 20 GiB.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or home() / "cache"
        self.limit = default_limit() if limit is None else limit

    def path(self, name: str) -> Path | None:
        """The file of a name, None where it is not there."""
        path = self.folder / name
        return path if path.is_file() else None

    def used(self, name: str) -> None:
        """Say that a file is used now; it is enough to say so once a minute."""
        stamp = self.folder / f"{name}.used"
        with contextlib.suppress(FileNotFoundError):
            if time.time() - stamp.stat().st_mtime < RESTAMP:
                return
        stamp.touch()

    def fetch(
        self,
        repository: Repository,
        descriptor: Descriptor,
        name: str,
        *,
        check: Check = lambda draft: None,
        progress: Progress = no_progress,
    ) -> Path:
        """The file of a blob, which is pulled where it is not there: once, whoever else wants it
        meanwhile, and from where an earlier attempt has stopped.

        Args:
            name: the file's, which must come from the digest.
            check: sees the whole file, whose digest is right, before it has its name.
            progress: may raise, while it waits for another download too; what is there stays.

        Raises:
            StorageFull: larger than the cache; and as `Repository.fetch` and `check` do.
        """
        if descriptor.size > self.limit:
            raise StorageFull(
                f"{name} is larger than the cache",
                found=f"{descriptor.size / 2**30:.3g} GiB",
                expected=f"{self.limit / 2**30:.3g} GiB at most",
                remedy=f"set {LIMIT} to more",
            )
        with self.draft(descriptor, progress) as draft:
            if (path := self.path(name)) is None:
                self._bring(repository, descriptor, draft, progress)
                check_draft(draft, check)
                self.used(name)
                path = self.folder / name
                os.replace(draft, path)
            else:
                self.used(name)
                progress(descriptor.size)
        self.collect()
        return path

    def _bring(
        self, repository: Repository, descriptor: Descriptor, draft: Path, progress: Progress
    ) -> None:
        """Download a blob; on a disk that is full before the limit is reached, into the room of
        what was not used for the longest."""
        came = 0

        def counted(more: int) -> None:
            nonlocal came
            came += more
            progress(more)

        try:
            repository.fetch(descriptor, draft, counted)
        except StorageFull:
            if not self.collect(room=descriptor.size).removed:
                raise
            progress(-came)  # what is there already is counted again
            repository.fetch(descriptor, draft, progress)

    @contextlib.contextmanager
    def draft(self, descriptor: Descriptor, progress: Progress = no_progress) -> Iterator[Path]:
        """The file that a blob is downloaded to, for one download at a time; what is left of it
        is there the next time, unless it is empty."""
        folder = self.folder / "partial"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / descriptor.hex
        # A lock on a file that has lost its name meanwhile is worth nothing.
        while not (_locked(handle := _opened(path)) and _is_at(handle, path)):
            os.close(handle)
            time.sleep(WAIT)
            progress(0)
        try:
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                if not path.stat().st_size:
                    path.unlink()
            os.close(handle)

    def remove(self, name: str) -> None:
        """Remove a file and what lies beside it."""
        for path in (self.folder / name, *self.folder.glob(f"{name}.*")):
            path.unlink(missing_ok=True)

    def collect(self, room: int = 0) -> Collected:
        """Remove what was not used for the longest, until the rest is within the limit and `room`
        bytes are free that were not; parts of downloads that nobody has gone on with for days; and
        what lies beside no file. Downloads that run stay, and so does what was used in the last
        seconds."""
        entries = sorted(self._entries(), key=lambda entry: entry.used)
        total, removed, freed, now = sum(e.size for e in entries), 0, 0, time.time()
        most = min(self.limit, total - room)
        for entry in entries:
            stale = entry.partial and now - entry.used > STALE
            if not stale and (total - freed <= most or now - entry.used < self._fresh):
                continue
            if self._remove(entry):
                removed, freed = removed + 1, freed + entry.size
        for stray in self._strays(now):
            stray.unlink(missing_ok=True)
        return Collected(removed, freed, len(entries) - removed, total - freed)

    @property
    def _fresh(self) -> float:
        return FRESH if self.limit else 0.0

    def _remove(self, entry: _Entry) -> bool:
        """Whether an entry could be removed: not a download that runs."""
        if not entry.partial:
            self.remove(entry.path.relative_to(self.folder).as_posix())
            return True
        try:
            handle = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if free := _locked(handle) and _is_at(handle, entry.path):
                entry.path.unlink()
            return free
        finally:
            os.close(handle)

    def _strays(self, now: float) -> Iterator[Path]:
        """What lies beside a file that is not there: of a pull that was killed between both, say.
        A pull that runs puts both in place within a moment."""
        for path in _files(self.folder):
            for suffix in SUFFIXES:
                name, is_beside, _ = path.name.partition(f"{suffix}.")
                if is_beside and not (self.folder / f"{name}{suffix}").exists():
                    with contextlib.suppress(FileNotFoundError):
                        if now - path.stat().st_mtime > FRESH:
                            yield path

    def _entries(self) -> Iterator[_Entry]:
        """What takes room."""
        for folder in (self.folder, self.folder / "listings", self.folder / "partial"):
            partial = folder.name == "partial"
            for path in _files(folder):
                if folder == self.folder and path.suffix not in SUFFIXES:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat(follow_symlinks=False)
                    if facts.st_nlink == 1:
                        yield _Entry(path, facts.st_size, _used(path, facts.st_mtime), partial)


def check_draft(draft: Path, check: Check) -> None:
    """Check a whole draft. One that is refused goes: no other attempt makes it better."""
    try:
        check(draft)
    except AwarenessError:
        draft.unlink(missing_ok=True)
        raise


def caches() -> list[Path]:
    """The folders of all caches of this home: the one of the commands, and servers'."""
    folder = home() / "cache"
    return [folder, *sorted(path for path in folder.glob("served/*") if path.is_dir())]


def default_limit() -> int:
    """Bytes of `$AWARENESS_CACHE_GIB`. Raises BadInput."""
    text = os.environ.get(LIMIT)
    try:
        gib = float(text) if text else DEFAULT_LIMIT
        if not 0 <= gib < 1 << 30:
            raise ValueError("not a size")
    except ValueError as error:
        raise BadInput(f"{LIMIT} cannot be used", found=repr(text), expected="GiB") from error
    return int(gib * 2**30)


def _files(folder: Path) -> Iterator[Path]:
    """The regular files in a folder, which need not be there."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        yield from (Path(e.path) for e in entries if e.is_file(follow_symlinks=False))


def _used(path: Path, modified: float) -> float:
    """When a file was used last, in seconds since 1970."""
    try:
        return max(modified, path.with_name(f"{path.name}.used").stat().st_mtime)
    except FileNotFoundError:
        return modified


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        facts = path.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), facts)


def _locked(handle: int) -> bool:
    """Whether the lock was taken: not where another one holds it. Where there are no locks (NFS),
    downloads of one blob disturb each other, and their digests say so."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True
