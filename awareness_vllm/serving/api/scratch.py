"""The front end's folder of captured states: private, and removed however the server ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from pathlib import Path

PREFIX = "awareness-captures-"
NEW = ".new-"
LOCK = "lock"


class ScratchFolder:
    """A new folder of mode 0700 under the system's temporary one. It is locked while its process
    lives and removed at its end; folders of servers that were killed are removed now."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        sweep(parent)
        # It takes its name when it is locked: no other server's sweep sees it without a holder.
        new = Path(tempfile.mkdtemp(prefix=NEW + PREFIX))
        lock = os.open(new / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        self.path = new.rename(parent / new.name.removeprefix(NEW))
        self.end = weakref.finalize(self, _remove, self.path, lock)


def sweep(parent: Path) -> None:
    """Remove this user's folders whose servers are gone."""
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # not one of ours, or another server has removed it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)  # its server lives
        else:
            _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
