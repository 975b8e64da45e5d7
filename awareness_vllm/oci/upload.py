"""Blobs on their way to a registry, from the beginning with each attempt."""

from __future__ import annotations

from collections.abc import Iterator

from awareness_vllm.oci.artefact import Layer
from awareness_vllm.oci.download import CHUNK
from awareness_vllm.oci.repository import Progress


class Upload:
    """The bytes of a layer to send, from the beginning each time that they are iterated: once for
    each attempt."""

    def __init__(self, layer: Layer, progress: Progress) -> None:
        self.layer, self.progress, self.sent = layer, progress, 0

    def __len__(self) -> int:
        return self.layer.descriptor.size

    def __iter__(self) -> Iterator[bytes]:
        self.progress(-self.sent)
        self.sent = 0
        if isinstance(self.layer.content, bytes):
            self._count(self.layer.content)
            yield self.layer.content
            return
        with self.layer.content.open("rb", buffering=0) as file:
            # No more than announced, should the file have grown.
            while chunk := file.read(min(CHUNK, len(self) - self.sent)):
                self._count(chunk)
                yield chunk

    def _count(self, chunk: bytes) -> None:
        self.sent += len(chunk)
        self.progress(len(chunk))
