"""Registries that lie, stop, or answer what no registry should: typed errors, nothing half-written,
and what has come stays for the next attempt."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hostile_registry import Answer, HostileRegistry, Request, hostile_registry
from registry_server import serving

from awareness_vllm.errors import (
    ArtefactCorrupt,
    ArtefactNotFound,
    AwarenessError,
    RegistryDenied,
    RegistryError,
    RegistryTimeout,
    StorageFull,
)
from awareness_vllm.marketplace.files import artefact_of, pull_file, push_file
from awareness_vllm.oci import download
from awareness_vllm.oci.artefact import MANIFEST, MAX_CONFIG
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.deadline import deadline_at
from awareness_vllm.packages.file import Package, publish

pytestmark = [pytest.mark.unit, pytest.mark.slow, pytest.mark.usefixtures("empty_home")]


@pytest.fixture
def memory(make_package: Callable[..., Package], tmp_path: Path) -> Path:
    return publish(make_package("x" * 20_000), tmp_path / "author")


@pytest.fixture
def hostile(memory: Path) -> Iterator[HostileRegistry]:
    with hostile_registry(artefact_of(memory), memory.stem) as registry:
        yield registry


def pulled(hostile: HostileRegistry, tmp_path: Path) -> Path:
    return pull_file(open_repository(hostile.reference), hostile.tag, tmp_path / "store")


def endless(request: Request) -> None:
    """A body of no announced length that does not end before the client has had enough."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    chunk = bytes(1 << 16)
    try:
        while True:
            request.wfile.write(b"10000\r\n" + chunk + b"\r\n")
    except ConnectionError:
        request.close_connection = True


def html(request: Request) -> None:
    request.answer(b"<html>Welcome to the hotel's network</html>", Content_Type="text/html")


def altered(request: Request) -> None:
    blob = bytearray(request.registry.file)
    blob[-1] ^= 1
    request.ranged(bytes(blob))


def elsewhere(request: Request) -> None:
    request.answer(status=202, Location="http://192.0.2.1/v2/team/memories/blobs/uploads/1")


def presigned(request: Request) -> None:
    request.answer(status=302, Location="http://127.0.0.1:1/bucket?X-Amz-Signature=0123")


TAGS = b'{"tags": ["v1"]}'
LAYER = "LAYER"
"""The path of the layer, which the test puts here."""


@pytest.mark.parametrize(
    ("part", "answer", "kind", "match"),
    [
        ("manifests", html, ArtefactCorrupt, "text/html"),
        ("manifests", endless, RegistryError, "bytes at most"),
        (
            "manifests",
            lambda r: r.answer(b"{}", Content_Type="text/plain"),
            ArtefactCorrupt,
            "type",
        ),
        (
            "manifests",
            lambda r: r.answer(b"[]", Content_Type=r.registry.artefact.config_type),
            ArtefactCorrupt,
            "type",
        ),
        (LAYER, altered, ArtefactCorrupt, "with sha256"),
        (LAYER, endless, ArtefactCorrupt, "more than"),
        (LAYER, lambda r: r.answer(r.registry.file + b"x"), ArtefactCorrupt, "cannot be used"),
        (LAYER, lambda r: r.answer(r.registry.file[:-1]), ArtefactCorrupt, "cannot be used"),
        (LAYER, lambda r: r.answer(length=len(r.registry.file)), RegistryError, "breaks off"),
        (LAYER, lambda r: r.answer(r.registry.file[9:], 206), ArtefactCorrupt, "from 0 on"),
        (LAYER, lambda r: r.answer(status=404), ArtefactNotFound, "no such blob"),
        (LAYER, lambda r: r.answer(status=302, Location=r.path), RegistryError, "redirects"),
        (LAYER, lambda r: r.answer(status=401), RegistryDenied, "docker login"),
        (LAYER, lambda r: r.answer(status=403), RegistryDenied, "docker login"),
        (LAYER, lambda r: r.answer(status=503, Retry_After="0"), RegistryError, "503"),
        (LAYER, lambda r: r.answer(status=418, Retry_After="9²"), RegistryError, "418"),
        (LAYER, lambda r: r.answer(b"[" * 100_000, status=400), RegistryError, "400"),
        (LAYER, presigned, RegistryError, r"/bucket\?…"),
        (LAYER, lambda r: r.answer(status=429, Retry_After="3600"), RegistryError, "in 3600 s"),
        (LAYER, lambda r: r.answer(status=418), RegistryError, "418"),
    ],
)
def test_nothing_of_it_is_in_place(
    hostile: HostileRegistry,
    part: str,
    answer: Answer,
    kind: type[AwarenessError],
    match: str,
    tmp_path: Path,
) -> None:
    hostile.odd[hostile.layer.digest if part == LAYER else part] = answer
    with pytest.raises(kind, match=match):
        pulled(hostile, tmp_path)
    assert not list((tmp_path / "store").glob("*"))
    # It is right again, and so is what comes: nothing wrong was kept.
    hostile.odd.clear()
    assert pulled(hostile, tmp_path).read_bytes() == hostile.file


def test_a_manifest_of_another_digest(hostile: HostileRegistry) -> None:
    other = hostile.document.replace(b'"schemaVersion":2', b'"schemaVersion": 2')
    hostile.odd["manifests"] = lambda request: request.answer(other, Content_Type=MANIFEST)
    repository = open_repository(hostile.reference)
    assert repository.manifest(hostile.tag)[1] == other  # a registry need not say the digest
    with pytest.raises(ArtefactCorrupt, match="sha256"):
        repository.manifest(hostile.digest)


@pytest.mark.parametrize("ranges", [True, False], ids=["by range", "all again"])
def test_a_broken_transfer_goes_on(hostile: HostileRegistry, ranges: bool, tmp_path: Path) -> None:
    half = hostile.layer.size // 2

    def breaks(request: Request) -> None:
        if len(hostile.blob_requests) == 1:
            request.ranged(request.registry.file, half)
        elif ranges:
            request.as_it_should()
        else:
            request.answer(request.registry.file)

    hostile.odd[hostile.layer.digest] = breaks
    brought: list[int] = []
    repository = open_repository(hostile.reference)
    path = pull_file(repository, hostile.tag, tmp_path / "store", brought.append)
    assert path.read_bytes() == hostile.file
    assert hostile.blob_requests == [None, f"bytes={half}-"]
    assert sum(brought) == hostile.layer.size


def test_the_next_pull_goes_on_where_this_one_was_given_up(
    hostile: HostileRegistry, empty_home: Path, tmp_path: Path
) -> None:
    half = hostile.layer.size // 2
    hostile.odd[hostile.layer.digest] = lambda request: request.ranged(request.registry.file, half)
    with pytest.raises(RegistryError, match="pull again"):
        pulled(hostile, tmp_path)
    (partial,) = (empty_home / "cache" / "partial").iterdir()
    assert partial.stat().st_size == half
    hostile.odd.clear()
    hostile.requests.clear()
    pulled(hostile, tmp_path)
    assert hostile.blob_requests == [f"bytes={half}-"]


def test_a_part_that_was_altered_is_fetched_again(
    hostile: HostileRegistry, empty_home: Path, tmp_path: Path
) -> None:
    (empty_home / "cache" / "partial").mkdir(parents=True)
    (empty_home / "cache" / "partial" / hostile.layer.hex).write_bytes(b"something else")
    pulled(hostile, tmp_path)
    assert hostile.blob_requests == ["bytes=14-", None]


def test_a_blob_of_another_size_is_not_taken_for_the_one_to_push(
    hostile: HostileRegistry, memory: Path
) -> None:
    hostile.odd["blobs"] = lambda request: request.answer(b"abc")
    with pytest.raises(ArtefactCorrupt, match=r"3 bytes.*push again"):
        push_file(memory, open_repository(hostile.reference))
    assert not [request for request in hostile.requests if request.command == "PUT"]


def test_a_full_disk(
    hostile: HostileRegistry, monkeypatch: pytest.MonkeyPatch, empty_home: Path, tmp_path: Path
) -> None:
    class Full(FileIO):
        def write(self, content: Any) -> int:
            if self.tell() + len(content) > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    with monkeypatch.context() as patch:
        patch.setattr(download, "FileIO", Full)
        patch.setattr(download, "CHUNK", 1 << 14)
        with pytest.raises(StorageFull, match="gc"):
            pulled(hostile, tmp_path)
    assert list((tmp_path / "store").iterdir()) == []
    pulled(hostile, tmp_path)


def test_a_busy_registry_is_asked_again(hostile: HostileRegistry, tmp_path: Path) -> None:
    def busy(request: Request) -> None:
        if len(hostile.requests) < 3:
            request.answer(b"<html>", 503, Retry_After="0")
        else:
            request.as_it_should()

    hostile.odd["manifests"] = busy
    assert pulled(hostile, tmp_path).is_file()


def test_a_redirect_takes_no_login_along(hostile: HostileRegistry, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Storage(Request):
        registry = hostile

        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.ranged(hostile.file)

    with serving(Storage) as storage:
        address = f"http://localhost:{storage.server_port}/bucket/1"
        hostile.odd[hostile.layer.digest] = lambda r: r.answer(status=307, Location=address)
        repository = open_repository(hostile.reference, api_key="secret")
        pull_file(repository, hostile.tag, tmp_path / "store")
    assert hostile.requests[0].headers["Authorization"] == "Bearer secret"
    assert seen == [None]


def test_uploads_go_to_no_other_host(hostile: HostileRegistry, memory: Path) -> None:
    hostile.odd |= {"uploads": elsewhere, "blobs": lambda request: request.answer(status=404)}
    with pytest.raises(RegistryError, match="sends its clients elsewhere"):
        push_file(memory, open_repository(hostile.reference))
    assert not [request for request in hostile.requests if request.command == "PUT"]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (html, "in JSON"),
        (endless, "more than"),
        (lambda r: r.answer(b'{"tags": [1]}'), "in JSON"),
        (
            lambda r: r.answer(b'{"tags": ["a"]}', Link='<http://192.0.2.1/>; rel="next"'),
            "elsewhere",
        ),
        (lambda r: r.answer(b'{"tags": ["a"]}', Link=f'<{r.path}>; rel="next"'), "without end"),
    ],
)
def test_lists_of_tags(
    hostile: HostileRegistry, answer: Answer, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awareness_vllm.oci.remote.MAX_TAGS", 1000)
    hostile.odd["tags/list"] = answer
    with pytest.raises(RegistryError, match=match):
        list(open_repository(hostile.reference).tags())


@pytest.mark.parametrize("token", [b"<html>", b"[]", b'{"token": 3}', b"{}", b"0" * (9 << 20)])
def test_servers_of_tokens(hostile: HostileRegistry, token: bytes) -> None:
    hostile.odd |= {
        "/token": lambda request: request.answer(token),
        "manifests": lambda request: request.answer(
            status=401, Www_Authenticate=f'Bearer realm="http://{hostile.host}/token"'
        ),
    }
    with pytest.raises(RegistryError):
        open_repository(hostile.reference).manifest("v1")


@pytest.mark.parametrize("host", ["registry.invalid", "127.0.0.1:1"])
def test_a_host_that_is_not_there(host: str) -> None:
    with pytest.raises(RegistryError, match="cannot be used"):
        open_repository(f"oci://{host}/team/memories").manifest("v1")


@pytest.mark.parametrize("part", ["manifests", LAYER])
def test_a_registry_that_is_silent(hostile: HostileRegistry, part: str, tmp_path: Path) -> None:
    over = threading.Event()

    def silent(request: Request) -> None:
        if part == LAYER:
            request.answer(b"x", length=hostile.layer.size)
            request.wfile.flush()
        over.wait(10)

    hostile.odd[hostile.layer.digest if part == LAYER else part] = silent
    repository = open_repository(hostile.reference, timeout=(1, 0.05))
    begin = time.monotonic()
    try:
        with pytest.raises(RegistryError, match="timed out"):
            pull_file(repository, hostile.tag, tmp_path / "store")
    finally:
        over.set()
    assert time.monotonic() - begin < 2


def dripping(request: Request) -> None:
    """A header that never ends, of which a byte comes now and then."""
    with contextlib.suppress(OSError):
        request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
        for _ in range(500):
            request.wfile.write(b"x")
            time.sleep(0.02)
    request.close_connection = True


def dripping_body(request: Request) -> None:
    request.drip(500 * b" ", Content_Type=MANIFEST)


def busy_for_long(request: Request) -> None:
    request.answer(status=503, Retry_After="20")


def login_that_drips(request: Request) -> None:
    if "/token" in request.path:
        dripping_body(request)
    else:
        realm = f"http://{request.registry.host}/token"
        request.answer(status=401, Www_Authenticate=f'Bearer realm="{realm}"')


@pytest.mark.parametrize(
    "answer", [dripping, dripping_body, busy_for_long, login_that_drips], ids=lambda a: a.__name__
)
def test_requests_end_by_their_deadline(
    hostile: HostileRegistry, answer: Answer, tmp_path: Path
) -> None:
    """However a registry draws them out: its next byte always comes before a timeout."""
    hostile.odd[""] = answer
    repository, begin = open_repository(hostile.reference, timeout=(1, 1)), time.monotonic()
    for request in (
        lambda: repository.manifest(hostile.tag),
        lambda: list(repository.tags()),
        lambda: repository.blob(hostile.artefact.config_layer.descriptor, MAX_CONFIG),
        lambda: repository.fetch(hostile.layer, tmp_path / "draft"),
        lambda: repository.referrers(hostile.digest),
    ):
        until = time.monotonic() + 0.15
        with deadline_at(lambda until=until: until), pytest.raises(RegistryTimeout):
            request()
    assert time.monotonic() - begin < 2
    hostile.odd.clear()
    with deadline_at(lambda: time.monotonic() + 5):
        assert repository.manifest(hostile.tag)[1] == hostile.document


def test_errors_say_what_the_registry_says(hostile: HostileRegistry) -> None:
    complaint = {"errors": [{"code": "DENIED", "message": "your \x1b[31m quota is used up"}]}
    hostile.odd["manifests"] = lambda r: r.answer(json.dumps(complaint).encode(), 403)
    with pytest.raises(RegistryDenied, match=r"\\x1b\[31m quota is used up"):
        open_repository(hostile.reference).manifest("v1")
