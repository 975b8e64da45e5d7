"""Requests to a registry, over `oras` and `requests`: logins, timeouts, retries, typed errors."""

from __future__ import annotations

import contextlib
import inspect
import ipaddress
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from oras.provider import Registry

from awareness_vllm.errors import RegistryError
from awareness_vllm.oci.adapter import Adapter, Timeout
from awareness_vllm.oci.deadline import check_deadline, seconds_left
from awareness_vllm.oci.failures import MALFORMED, PLAIN_HTTP, failure_of, without_query
from awareness_vllm.oci.login import Login, Refused, complaint_of, denied
from awareness_vllm.oci.reference import Reference

TIMEOUT: Timeout = (10.0, 60.0)
ATTEMPTS = 5
LONGEST_WAIT = 30.0
"""Seconds: of a registry that asks for more patience, the error says so."""
BUSY = (429, 500, 502, 503, 504)
REDIRECTS = 5
_request = inspect.unwrap(Registry.do_request)
"""`Registry.do_request` without its retries: they sleep for two minutes before an unknown host is
reported, and send a body that has been read to its end."""
logging.getLogger("oras.logger").addHandler(logging.NullHandler())  # our errors say it


class _Interrupted(Exception):
    """A connection that broke: the next one may not."""

    def __init__(self, error: RegistryError) -> None:
        super().__init__()
        self.error = error


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
        self.login = login = Login(api_key)
        login.session, login.prefix, login._tls_verify = http, self.registry.prefix, True
        login.hostname = reference.host
        self.registry.auth = login
        if api_key is None:
            try:
                login.load_configs(f"{reference.host}/{reference.repository}", _docker_configs())
            except (*MALFORMED, OSError) as error:
                # oras takes docker's configuration and its helpers' answers to be as they should.
                raise RegistryError(
                    f"docker's configuration says no login to {reference.host}",
                    found=f"{type(error).__name__}: {error}"[:200],
                    expected="a config.json as docker writes it, and helpers that work",
                    remedy="repair it, or `docker login` again, or give an API key",
                ) from error

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
            except Refused as refused:
                response, done = refused.response, False
            except _Interrupted as broken:
                if last:
                    raise broken.error from broken
                _sleep(0.2 * 2**attempt)
                continue
            else:
                done = response.status_code in expect
            if done:
                return response
            wait = _wait(response, attempt)
            if response.status_code not in BUSY or last or wait > LONGEST_WAIT:
                raise self._refused(response, expect)
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
                found=without_query(url.geturl())[:200],
                expected=f"an address of {self.reference.host}",
            )
        # The scheme stays: behind a proxy, registries may take themselves to be reached over http.
        return url._replace(scheme=urlsplit(self.base).scheme).geturl()

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        """Turns the errors of the libraries into ours: oras takes challenges and tokens to be as
        they should be."""
        try:
            yield
        except (requests.RequestException, *MALFORMED) as error:
            check_deadline()
            failure, found = failure_of(error), ""
            request = getattr(error, "request", None)
            if request is not None and urlsplit(request.url).netloc != self.reference.host:
                found = f", at {without_query(request.url)[:200]}"
            unusable = RegistryError(
                f"{self.reference} cannot be used",
                found=failure.found + found,
                expected="an OCI registry that answers",
                remedy=failure.remedy,
            )
            raise (_Interrupted(unusable) if failure.passing else unusable) from error

    def _refused(self, response: requests.Response, expect: tuple[int, ...]) -> RegistryError:
        """The error about a status that was not expected."""
        if response.status_code in (401, 403):
            return denied(self.reference, self.login, response)
        complaint = complaint_of(response, self.reference)
        if response.status_code not in BUSY:
            return RegistryError(
                f"{self.reference} does not do what it is asked to",
                found=complaint,
                expected=f"the status {' or '.join(map(str, expect))}",
                remedy="check the repository's name, and that it is an OCI registry",
            )
        wait = response.headers.get("Retry-After")
        return RegistryError(
            f"{self.reference} cannot be used now",
            found=complaint,
            expected="a registry that is up and has time",
            remedy=f"try again in {wait} s" if wait and wait.isdecimal() else "try again later",
        )


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
