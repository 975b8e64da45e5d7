"""Debian's `docker-registry` (Distribution 2.8) on a free port of this machine, for the tests."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

BINARY = "docker-registry"
USER, PASSWORD = "alice", "correct horse"
BCRYPT = "$2b$04$0.nOuig85zJSpb5Kx.QfzO9yvVn8yA2x3EhbkcI/Um5aX3xzFOlMq"
"""The password's digest in the one form that the registry knows."""
SERVICE, ISSUER = "test registry", "test issuer"


@dataclass
class RegistryServer:
    """A running registry: its host with the port, and the folder that it stores in."""

    host: str
    folder: Path
    process: subprocess.Popen[bytes]

    def reference(self, repository: str = "team/memories") -> str:
        return f"oci://{self.host}/{repository}"


@dataclass
class TokenServer:
    """A server of tokens, for USER and PASSWORD alone unless it is `open` to all.

    Its tokens are good for `lifetime` seconds; `asked` are the scopes that were asked for.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    lifetime: int = 60
    open: bool = False
    asked: list[str] = field(default_factory=list)
    server: ThreadingHTTPServer | None = None

    @property
    def realm(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_port}/token"

    def token(self, scopes: list[str], user: str = USER) -> str:
        """A token with all that is asked for."""
        now = int(time.time())
        certificate = base64.b64encode(self.certificate.public_bytes(Encoding.DER)).decode()
        header = {"typ": "JWT", "alg": "ES256", "x5c": [certificate]}
        access = [
            {"type": kind, "name": name, "actions": actions.split(",")}
            for kind, name, actions in (scope.split(":") for scope in scopes)
        ]
        # Time for clocks that differ is the registry's: 60 s, which a lifetime below 0 outlasts.
        claims = {
            **{"iss": ISSUER, "sub": user, "aud": SERVICE, "jti": str(now)},
            **{"exp": now + self.lifetime, "nbf": now - 3600, "iat": now - 3600, "access": access},
        }
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
        signature = self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256()))
        raw = b"".join(n.to_bytes(32, "big") for n in decode_dss_signature(signature))
        return f"{signed}.{_encoded(raw)}"


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


class Handler(BaseHTTPRequestHandler):
    """A request to a server of a test, which prints nothing."""

    # Head and body are sent apart: with Nagle's algorithm the body waits 40 ms for the head's ACK.
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[ThreadingHTTPServer]:
    """An HTTP server on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def token_server() -> Iterator[TokenServer]:
    """A server of tokens with a new key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, ISSUER)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    tokens = TokenServer(key, certificate)
    login = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Tokens(Handler):
        def do_GET(self) -> None:
            scopes = parse_qs(urlsplit(self.path).query).get("scope", [])
            tokens.asked += scopes
            known = self.headers.get("Authorization") == login
            if known or tokens.open:
                granted = scopes if known else [s.rpartition(":")[0] + ":pull" for s in scopes]
                body = json.dumps({"token": tokens.token(granted)}).encode()
                self.send_response(200)
            else:
                body = b'{"details": "incorrect username or password"}'
                self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with serving(Tokens) as server:
        tokens.server = server
        yield tokens


@contextlib.contextmanager
def registry_server(folder: Path, auth: dict[str, Any] | None = None) -> Iterator[RegistryServer]:
    """A registry that stores in a folder, with an `auth` section of its configuration."""
    assert shutil.which(BINARY), f"{BINARY} is not installed: `make registry` does"
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    configuration = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(folder / "storage")},
            "delete": {"enabled": True},
            "cache": {"blobdescriptor": "inmemory"},
        },
        "http": {"addr": host},
        **({"auth": auth} if auth else {}),
    }
    (folder / "config.yml").write_text(json.dumps(configuration))  # JSON is YAML
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [BINARY, "serve", str(folder / "config.yml")], stdout=log, stderr=log
        )
    try:
        _wait_for(host, process, folder / "log")
        yield RegistryServer(host, folder, process)
    finally:
        process.terminate()
        process.wait()


def _wait_for(host: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(500):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://{host}/v2/").close()
        except urllib.error.HTTPError:
            return  # 401: it is there
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(log.read_text())


def basic_auth(folder: Path) -> dict[str, Any]:
    """An `auth` section that lets in USER with PASSWORD."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(f"{USER}:{BCRYPT}\n")
    return {"htpasswd": {"realm": "test registry", "path": str(folder / "htpasswd")}}


def token_auth(folder: Path, tokens: TokenServer) -> dict[str, Any]:
    """An `auth` section that lets in who has a token."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = folder / "issuer.pem"
    bundle.write_bytes(tokens.certificate.public_bytes(Encoding.PEM))
    return {
        "token": {
            "realm": tokens.realm,
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(bundle),
        }
    }
