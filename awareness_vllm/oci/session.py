"""Requests to a registry, over `oras` and `requests`: logins, timeouts, retries, typed errors."""

from __future__ import annotations

import contextlib
import inspect
import ipaddress
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from oras.auth.token import TokenAuth
from oras.provider import Registry

from awareness_vllm.errors import RegistryDenied, RegistryError, escaped
from awareness_vllm.oci.adapter import Adapter, Timeout
from awareness_vllm.oci.deadline import check_deadline, seconds_left
from awareness_vllm.oci.reference import Reference

PLAIN_HTTP = "AWARENESS_PLAIN_HTTP"
"""Environment variable: hosts, with their ports, that are spoken to over http."""
TIMEOUT: Timeout = (10.0, 60.0)
ATTEMPTS = 5
LONGEST_WAIT = 30.0
"""Seconds: of a registry that asks for more patience, the error says so."""
BUSY = (429, 500, 502, 503, 504)
REDIRECTS = 5
MALFORMED = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What comes of reading a document that is not as it should be."""
QUERY = re.compile(r"\?[^\s'\"()]*")
"""The query in the address of a message."""
_request = inspect.unwrap(Registry.do_request)
"""`Registry.do_request` without its retries: they sleep for two minutes before an unknown host is
reported, and send a body that has been read to its end."""
logging.getLogger("oras.logger").addHandler(logging.NullHandler())  # our errors say it


class _Denied(Exception):
    """An answer that no login of ours does for."""

    def __init__(self, response: requests.Response) -> None:
        super().__init__()
        self.response = response


class _Login(TokenAuth):
    """oras's login with tokens, which answers a challenge for basic authentication too, and asks
    for another token where the one that was sent has expired or does not reach far enough."""

    def __init__(self, api_key: str | None) -> None:
        super().__init__()
        self.given = api_key is not None and ":" not in api_key
        self.basic = False
        if self.given:
            self.set_token_auth(str(api_key))
        elif api_key is not None:
            self.set_basic_auth(*api_key.split(":", 1))

    def get_auth_header(self) -> dict[str, str]:
        token = self.token
        return {"Authorization": f"{'Basic' if self.basic else 'Bearer'} {token}"} if token else {}

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        challenge = original.headers.get("Www-Authenticate", "")
        if self.given or not challenge:
            raise _Denied(original)
        if not challenge.lower().startswith("basic"):
            self.token = None
            headers, changed = super().authenticate_request(original, headers, refresh)
        else:
            self.basic, self.token = True, getattr(self, "_basic_auth", None)
            tried = original.request.headers.get("Authorization") == f"Basic {self.token}"
            headers, changed = headers | self.get_auth_header(), not tried and bool(self.token)
        if not changed:
            raise _Denied(original)
        return headers, True


class Session:
    """A registry's API, as one user is let in. Threads may share it.

    Args:
        api_key: a token, or "user:password"; without one, docker's configuration says how to log
            in.
    """

    def __init__(
        self, reference: Reference, *, api_key: str | None = None, timeout: Timeout = TIMEOUT
    ) -> None:
        assert reference.host is not None
        self.reference = reference
        plain = is_plain(reference.host)
        self.base = f"{'http' if plain else 'https'}://{reference.host}/v2/{reference.repository}/"
        self.registry = Registry(reference.host, insecure=plain)
        http = self.registry.session
        http.headers.update({"Accept-Encoding": "identity", "User-Agent": "awareness-vllm"})
        http.auth = _as_it_is  # else a netrc file would replace the login
        http.max_redirects = REDIRECTS
        for scheme in ("http://", "https://"):
            http.mount(scheme, Adapter(timeout))
        login = _Login(api_key)
        login.session, login.prefix, login._tls_verify = http, self.registry.prefix, True
        login.hostname = reference.host
        self.registry.auth = login
        if api_key is None:
            try:
                login.load_configs(f"{reference.host}/{reference.repository}", _docker_configs())
            except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
                # oras takes docker's configuration and its helpers' answers to be as they should.
                raise self._unreachable(error, "repair docker's config.json") from error

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        data: Iterable[bytes] | bytes | None = None,
        stream: bool = False,
        expect: tuple[int, ...] = (200,),
    ) -> requests.Response:
        """A response of an expected status.

        Args:
            path: below the repository's; or what a response has called the next one.
            data: the body; what is no bytes is iterated once for each time that it is sent.

        Raises:
            RegistryDenied; RegistryTimeout: the deadline is over; RegistryError: unreachable, or
            another status.
        """
        url = self.url(path)
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                with self._typed():
                    response = _request(
                        self.registry, url, method, data, dict(headers or {}), None, stream
                    )
            except _Denied as denied:
                raise self._refused(denied.response) from denied
            except _Interrupted:
                if last:
                    raise
                _sleep(0.2 * 2**attempt)
                continue
            if response.status_code in expect:
                return response
            wait = _wait(response, attempt)
            if response.status_code not in BUSY or last or wait > LONGEST_WAIT:
                raise self._refused(response)
            response.close()
            _sleep(wait)
        raise AssertionError("every attempt returns or raises")

    def url(self, path: str) -> str:
        """The address of a path, which must be this registry's: logins go with requests.

        Raises:
            RegistryError
        """
        url = urlsplit(urljoin(self.base, path))
        if url.netloc != urlsplit(self.base).netloc:
            raise RegistryError(
                f"{self.reference} sends its clients elsewhere",
                found=QUERY.sub("?…", url.geturl())[:200],
                expected=f"an address of {self.reference.host}",
            )
        # The scheme stays: behind a proxy, registries may take themselves to be reached over http.
        return url._replace(scheme=urlsplit(self.base).scheme).geturl()

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        """Turns the errors of the libraries into ours."""
        try:
            yield
        except requests.exceptions.SSLError as error:
            raise self._unreachable(
                error, f"name its host in {PLAIN_HTTP} if it speaks http alone"
            ) from error
        except (requests.ConnectionError, requests.Timeout) as error:
            check_deadline()
            kind = _Interrupted if _may_pass(error) else RegistryError
            raise self._unreachable(error, "check its address and the network", kind) from error
        except requests.RequestException as error:
            raise self._unreachable(error, "check that it is an OCI registry") from error
        except MALFORMED as error:
            # oras takes challenges and tokens to be as they should be.
            raise self._unreachable(error, "check that it is an OCI registry") from error

    def _unreachable(
        self, error: Exception, remedy: str, kind: type[RegistryError] = RegistryError
    ) -> RegistryError:
        return kind(
            f"{self.reference} cannot be used",
            # Where a registry keeps its blobs elsewhere, the query is what lets clients in there.
            found=QUERY.sub("?…", str(error))[:300],
            expected="an OCI registry that answers",
            remedy=remedy,
        )

    def _refused(self, response: requests.Response) -> RegistryError:
        """The error about a status that was not expected."""
        complaint = f"{response.status_code} {response.reason or ''}".strip()
        complaint += f" ({message})" if (message := self._message(response)) else ""
        if response.status_code in (401, 403):
            return RegistryDenied(
                f"{self.reference} does not let you in",
                found=escaped(complaint)[:400],
                expected="a login that may do this",
                remedy=f"`docker login {self.reference.host}`, or a token as the API key",
            )
        wait = response.headers.get("Retry-After")
        return RegistryError(
            f"{self.reference} does not do what it is asked to",
            found=escaped(complaint)[:400],
            remedy=f"try again in {wait} s" if wait and wait.isdecimal() else None,
        )

    def _message(self, response: requests.Response) -> str:
        """What the registry says of an error."""
        try:
            errors = json.loads(response.content)["errors"]
            return "; ".join(str(e.get("message") or e.get("code")) for e in errors)
        except (*MALFORMED, requests.RequestException):
            return ""  # the status speaks for itself
        finally:
            response.close()


class _Interrupted(RegistryError):
    """A connection that broke: the next one may not."""


def is_plain(host: str) -> bool:
    """Whether a host, with its port, is spoken to over http: this machine, or one that the
    environment names."""
    if host in os.environ.get(PLAIN_HTTP, "").split(","):
        return True
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _as_it_is(request: requests.PreparedRequest) -> requests.PreparedRequest:
    return request


def _docker_configs() -> list[str]:
    """Docker's configuration where the environment says so; oras finds the usual one."""
    folder = os.environ.get("DOCKER_CONFIG")
    path = Path(folder or "/nonexistent") / "config.json"
    return [str(path)] if path.is_file() else []


def _may_pass(error: Exception) -> bool:
    """Whether a connection was made and broke; a host that is unknown, refuses or is silent will go
    on so."""
    text = repr(error)
    return not any(sign in text for sign in ("NameResolution", "NewConnection", "Timeout"))


def _sleep(seconds: float) -> None:
    time.sleep(min(seconds, seconds_left()))


def _wait(response: requests.Response, attempt: int) -> float:
    """Seconds until a busy registry is asked again."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():  # digits such as ² are no numbers
        return float(text)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return float(0.2 * 2**attempt)
