"""Errors between here and a registry: what was found, in words, and what to do about it."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from registry_server import Handler, serving

from awareness_vllm.errors import RegistryDenied, RegistryError
from awareness_vllm.oci import session
from awareness_vllm.oci.connect import open_repository

pytestmark = pytest.mark.unit
Answer = Callable[[Handler], None]


@pytest.fixture(autouse=True)
def without_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_sleep", lambda seconds: None)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with serving(Answering) as running:
        yield running


class Answering(Handler):
    """Answers as the server's `answer` does."""

    def do_GET(self) -> None:
        answer: Answer = self.server.answer  # type: ignore[attr-defined]
        answer(self)

    do_HEAD = do_POST = do_PUT = do_CONNECT = do_GET


def status(code: int, body: bytes = b"<html>", **headers: str) -> Answer:
    def answer(request: Handler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return answer


def resets(request: Handler) -> None:
    linger = struct.pack("ii", 1, 0)
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.connection.close()


def speaks_no_http(request: Handler) -> None:
    request.wfile.write(b"SSH-2.0-OpenSSH_9\r\n")


def breaks_off(request: Handler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "100")
    request.end_headers()
    request.wfile.write(b"{}")


def redirects(request: Handler) -> None:
    status(307, Location=request.path)(request)


def error_of(reference: str, api_key: str | None = None) -> RegistryError:
    """The error about tags that are asked for; it has all parts, and none is a library's."""
    with pytest.raises(RegistryError) as caught:
        list(open_repository(reference, api_key=api_key, timeout=(0.3, 0.3)).tags())
    error = caught.value
    assert type(error) in (RegistryError, RegistryDenied)  # nothing private
    assert error.found
    assert error.expected
    assert error.remedy
    for name in ("Pool", "Max retries", "Caused by", "object at", "Error(", "urllib3"):
        assert name not in str(error)
    return error


@pytest.mark.parametrize(
    ("answer", "found", "remedy"),
    [
        (status(502), "502 Bad Gateway", "try again later"),
        (status(503), "503 Service Unavailable", "try again later"),
        (status(503, Retry_After="100"), "503 Service Unavailable", "try again in 100 s"),
        (status(400), "400 Bad Request", "repository's name"),
        (resets, "a connection that broke: Connection reset by peer", "try again"),
        (lambda r: r.connection.close(), "a connection that broke: Remote end closed", "network"),
        (breaks_off, "a connection that broke: IncompleteRead", "network"),
        (speaks_no_http, "an answer that is not HTTP", "OCI registry"),
        (redirects, "redirects without end", "OCI registry"),
        (status(307, Location="ftp://x/y"), "No connection adapters", "OCI registry"),
        (status(401, Www_Authenticate="Negotiate"), "that cannot be read", "OCI registry"),
        (status(401, Www_Authenticate='Bearer realm="http://127.0.0.1:1/t"'), "1:1/t", "network"),
    ],
)
def test_answers(server: ThreadingHTTPServer, answer: Answer, found: str, remedy: str) -> None:
    server.answer = answer  # type: ignore[attr-defined]
    error = error_of(f"oci://127.0.0.1:{server.server_port}/team/memories")
    assert found in str(error.found)
    assert remedy in str(error.remedy)


@pytest.mark.parametrize("code", [502, 503, 407])
def test_a_proxy_is_named(
    server: ThreadingHTTPServer, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answer = status(code)  # type: ignore[attr-defined]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")
    error = error_of("oci://registry.example/team/memories")
    assert str(error.found).startswith(f"a proxy that answers {code} ")
    assert "HTTPS_PROXY" in str(error.remedy)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    assert "a proxy that takes no" in str(error_of("oci://registry.example/team/memories").found)


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("registry.invalid", "a host without an address"),
        ("127.0.0.1:1", "a host that takes no connection: Connection refused"),
    ],
)
def test_a_host_that_is_not_there(host: str, found: str) -> None:
    assert str(error_of(f"oci://{host}/team/memories").found).startswith(found)


def test_silence(server: ThreadingHTTPServer) -> None:
    over = threading.Event()
    server.answer = lambda request: over.wait(10)  # type: ignore[attr-defined]
    try:
        error = error_of(f"oci://127.0.0.1:{server.server_port}/team/memories")
    finally:
        over.set()
    assert "timed out" in str(error.found)


def test_tls_that_is_none(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_plain", lambda host: False)
    server.answer = status(200)  # type: ignore[attr-defined]
    error = error_of(f"oci://127.0.0.1:{server.server_port}/team/memories")
    assert "no TLS" in str(error.found)
    assert session.PLAIN_HTTP in str(error.remedy)


@pytest.mark.parametrize(
    ("answer", "kind", "found"),
    [
        (status(503), RegistryError, "503 Service Unavailable from http://127.0.0.1"),
        (status(404), RegistryError, "404 Not Found from http://127.0.0.1"),
        (
            status(401, b'{"details": "unknown user"}'),
            RegistryDenied,
            "(unknown user)",
        ),
        (status(200, b'{"token": 3}'), RegistryError, "cannot be read"),
        (status(200, b"{}"), RegistryError, "cannot be read"),
    ],
)
def test_a_server_of_tokens_that_gives_none(
    server: ThreadingHTTPServer, answer: Answer, kind: type[RegistryError], found: str
) -> None:
    """Its answer is never taken for the registry's: that nobody has pushed anything, say."""
    with serving(Answering) as tokens:
        tokens.answer = answer  # type: ignore[attr-defined]
        realm = f'Bearer realm="http://127.0.0.1:{tokens.server_port}/token?secret=1"'
        server.answer = status(401, Www_Authenticate=realm)  # type: ignore[attr-defined]
        error = error_of(f"oci://127.0.0.1:{server.server_port}/team/memories", "alice:horse")
    assert type(error) is kind
    assert found in str(error.found)
    assert "horse" not in str(error)
    assert "secret" not in str(error)
