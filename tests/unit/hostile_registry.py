"""A registry of this machine that serves one artefact, and answers some requests as no registry
should."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from registry_server import Handler, serving

from awareness_vllm.oci.artefact import MANIFEST, Artefact, Descriptor, descriptor_of

Answer = Callable[["Request"], None]
RANGE = re.compile(r"bytes=(\d+)-")


class Request(Handler):
    """A request, and the ways to answer it."""

    protocol_version = "HTTP/1.1"
    registry: HostileRegistry

    def answer(
        self, body: bytes = b"", status: int = 200, *, length: int | None = None, **headers: str
    ) -> None:
        """A response, whose length may be a lie; the connection ends where it is."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
        self.close_connection = length not in (None, len(body))

    def drip(self, body: bytes, **headers: str) -> None:
        """A response, of whose body a byte comes now and then."""
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        self.close_connection = True

    def as_it_should(self) -> None:
        """The right answer."""
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/manifests/" in self.path and name in (self.registry.tag, self.registry.digest):
            self.answer(
                self.registry.document,
                Content_Type=MANIFEST,
                Docker_Content_Digest=self.registry.digest,
            )
        elif "/blobs/" in self.path and (blob := self.registry.blobs.get(name)) is not None:
            self.ranged(blob)
        else:
            self.answer(b'{"errors": [{"code": "NOT_FOUND"}]}', 404)

    def ranged(self, blob: bytes, end: int | None = None) -> None:
        """A blob, or its rest, of which no more than up to `end` is sent."""
        begin = int(m[1]) if (m := RANGE.fullmatch(self.headers.get("Range", ""))) else 0
        rest = {"Content_Range": f"bytes {begin}-{len(blob) - 1}/{len(blob)}"} if begin else {}
        self.answer(blob[begin:end], 206 if begin else 200, length=len(blob) - begin, **rest)

    def do_GET(self) -> None:
        self.registry.requests.append(Asked(self.command, self.path, dict(self.headers)))
        for part, answer in self.registry.odd.items():
            if part in self.path:
                answer(self)
                return
        self.as_it_should()

    do_HEAD = do_POST = do_PUT = do_GET


@dataclass(frozen=True)
class Asked:
    """What a request was."""

    command: str
    path: str
    headers: dict[str, str]


@dataclass
class HostileRegistry:
    """What is served: an artefact, under a tag. `odd` are the answers to the paths that contain
    some text."""

    artefact: Artefact
    tag: str
    blobs: dict[str, bytes]
    odd: dict[str, Answer] = field(default_factory=dict)
    requests: list[Asked] = field(default_factory=list)
    host: str = ""

    @property
    def document(self) -> bytes:
        return self.artefact.document

    @property
    def digest(self) -> str:
        return descriptor_of(self.document, MANIFEST).digest

    @property
    def reference(self) -> str:
        return f"oci://{self.host}/team/memories"

    @property
    def layer(self) -> Descriptor:
        (layer,) = self.artefact.layers
        return layer.descriptor

    @property
    def file(self) -> bytes:
        """The layer's bytes."""
        return self.blobs[self.layer.digest]

    @property
    def blob_requests(self) -> list[str | None]:
        """The Range headers of the requests for the layer."""
        asked = [request for request in self.requests if self.layer.digest in request.path]
        return [request.headers.get("Range") for request in asked]


@contextlib.contextmanager
def hostile_registry(artefact: Artefact, tag: str) -> Iterator[HostileRegistry]:
    """A registry of one artefact."""
    layers = [artefact.config_layer, *artefact.layers]
    blobs = {
        layer.descriptor.digest: c if isinstance(c := layer.content, bytes) else c.read_bytes()
        for layer in layers
    }
    registry = HostileRegistry(artefact, tag, blobs)
    with serving(type("Handler", (Request,), {"registry": registry})) as server:
        registry.host = f"127.0.0.1:{server.server_port}"
        yield registry
