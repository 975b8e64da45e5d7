"""The checkpoint of a fit: intermediate results on disk, from which a killed run resumes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from awareness_vllm.files import atomic_write
from awareness_vllm.tensor_file import FileRefused, read_file

KEY = "key"
NOTE = "awareness"


class Checkpoint:
    """Named sets of tensors in a folder, each with a JSON note and replaced atomically.

    Args:
        folder: created when missing, emptied where it has another `key`.
        key: identifies the fit: the models, the anchors, the configuration.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        mark = folder / KEY
        if not mark.is_file() or mark.read_text() != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(key)

    def save(self, name: str, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
        """Write a set of tensors and a JSON note under a name."""
        with atomic_write(self._path(name)) as draft:
            save_file(tensors, draft, {NOTE: json.dumps(note)})

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the note of a name; None where missing or unreadable."""
        try:
            file = read_file(self._path(name), lambda header: None)
            return file.tensors(), json.loads(file.header.metadata[NOTE])
        except (FileRefused, KeyError, ValueError):
            return None

    def remove(self) -> None:
        """Delete the checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


@contextmanager
def open_checkpoint(folder: Path | None, key: str) -> Iterator[Checkpoint]:
    """A checkpoint that is deleted when the block succeeds; without a folder, in any case."""
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Checkpoint(Path(temporary) / "checkpoint", key)
        return
    checkpoint = Checkpoint(folder, key)
    yield checkpoint
    checkpoint.remove()
