"""A server with a registry, in a layout that tests watch, hold up and falsify."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memories_server import Server, server_of_tenants

from awareness_vllm.errors import AwarenessError
from awareness_vllm.oci.artefact import (
    MANIFEST,
    Descriptor,
    Layer,
    descriptor_of,
    parse_image_manifest,
)
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.layout import Layout
from awareness_vllm.oci.repository import Progress
from awareness_vllm.packages.listing import CONFIG
from awareness_vllm.serving.pulls import Pulls
from awareness_vllm.wmatrix.file import WMatrix


class Watched(Layout):
    """A layout that counts what is asked of it, and sends blobs once it may."""

    def __init__(self, inner: Layout) -> None:
        super().__init__(inner.reference)
        self.lookups, self.fetches = 0, 0
        self.at_once, self.most_at_once = 0, 0
        self.may_send = threading.Event()
        self.may_send.set()
        self.error: AwarenessError | None = None

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        self.lookups += 1
        if self.error is not None:
            raise self.error
        return super().manifest(name)

    def fetch(
        self, descriptor: Descriptor, draft: Path, progress: Progress = lambda _: None
    ) -> None:
        self.fetches += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        assert self.may_send.wait(10)
        self.at_once -= 1
        super().fetch(descriptor, draft, progress)


def serve(
    folder: Path, where: object, model: Path, wmatrix: WMatrix, **options: Any
) -> Iterator[Server]:
    """A server of two tenants with a registry, and a map for the packages in it."""
    server = server_of_tenants(folder, model, registry=str(where), **options)
    server.add_map(wmatrix)
    pulls = pulls_of(server)
    if isinstance(layout := pulls.registry.repository, Layout):
        object.__setattr__(pulls.registry, "repository", Watched(layout))
    with server.client:  # one event loop for all requests
        yield server


def pulls_of(server: Server) -> Pulls:
    assert server.admission.pulls is not None
    return server.admission.pulls


def watched(server: Server) -> Watched:
    repository = pulls_of(server).registry.repository
    assert isinstance(repository, Watched)
    return repository


def without_text(listing: dict[str, Any]) -> dict[str, Any]:
    return listing | {"manifest": listing["manifest"] | {"has_text": False}}


def relist(layout: Path, memory: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Push an artefact again with a listing that lies, and a layer that agrees with it."""
    repository = open_repository(layout)
    manifest = parse_image_manifest(repository.manifest(memory)[1])
    listing = change(json.loads(repository.blob(manifest.config, 1 << 20)))
    config = json.dumps(listing).encode()
    repository.upload(Layer(config, descriptor_of(config, CONFIG)))
    layers = [manifest.layers[0].model_copy(update={"size": listing["bytes"]})]
    update = {"config": descriptor_of(config, CONFIG), "layers": layers}
    lying = manifest.model_copy(update=update).model_dump_json(by_alias=True, exclude_none=True)
    repository.put_manifest(lying.encode(), MANIFEST, memory)


def retag(layout: Path, memory: str, tag: str) -> None:
    """Have another memory's tag name a memory."""
    repository = open_repository(layout)
    descriptor, raw = repository.manifest(memory)
    repository.put_manifest(raw, descriptor.media_type, tag)
