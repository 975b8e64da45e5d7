"""A fit's unfinished work on disk: what a kill leaves is taken up by the next run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

KEY = "key"
NOTE = "awareness"


class Checkpoint:
    """Named sets of tensors, each with a note; a set is replaced whole or not at all.

    Args:
        folder: made when missing; what another `key` left there is thrown away.
        key: says what the work is part of: the models, the anchors, the configuration.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        mark = folder / KEY
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(key)

    def save(self, name: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Keep a set of tensors and a JSON note under a name."""
        temporary = self._path(f".{name}")
        save_file(tensors, temporary, {NOTE: json.dumps(note)})
        os.replace(temporary, self._path(name))

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept under a name; None where there is nothing, or nothing readable."""
        try:
            with safe_open(self._path(name), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, json.loads((file.metadata() or {})[NOTE])
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

    def remove(self) -> None:
        """The work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def workspace(folder: Path | None, key: str) -> Iterator[Checkpoint]:
    """A workspace that goes away when the work is done; without a folder, when it fails too."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Checkpoint(Path(temporary) / "work", key)
        return
    work = Checkpoint(folder, key)
    yield work
    work.remove()
