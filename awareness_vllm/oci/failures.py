"""What went wrong between here and a registry, in words: libraries tell it as a chain of errors,
each of which quotes the next."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from http.client import BadStatusLine, RemoteDisconnected

import requests
from urllib3 import exceptions

PLAIN_HTTP = "AWARENESS_PLAIN_HTTP"
"""Environment variable: hosts, with their ports, that are spoken to over http."""
QUERY = re.compile(r"\?[^\s'\"()]*")
TUNNEL = re.compile(r"Tunnel connection failed: (.+)")
NETWORK = "check its address and the network"
REGISTRY = "check that it is an OCI registry"
CERTIFICATES = "have REQUESTS_CA_BUNDLE name a file with the certificate of its issuer"
BROKEN = (
    requests.ConnectionError,
    requests.exceptions.ChunkedEncodingError,
    exceptions.ProtocolError,
    exceptions.IncompleteRead,
)
ADDRESSES = (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)
MALFORMED = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
"""What comes of reading a document that is not as it should be."""


@dataclass(frozen=True)
class Failure:
    """What was found instead of an answer, the remedy, and whether the next try may do better."""

    found: str
    remedy: str
    passing: bool = False


def failure_of(error: BaseException) -> Failure:
    """The failure that an error of `requests` or `urllib3`, or of reading an answer, tells of."""
    chain = _chain(error)
    last = chain[-1]
    detail = str(getattr(last, "strerror", None) or last).rstrip(".")[:200]

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(exceptions.ProxyError):
        return _of_proxy(detail)
    if has(ssl.SSLError, exceptions.SSLError, requests.exceptions.SSLError):
        return _of_tls(last, detail)
    if has(exceptions.NameResolutionError):
        return Failure(f"a host without an address: {detail}", NETWORK)
    if has(exceptions.NewConnectionError):
        return Failure(f"a host that takes no connection: {detail}", NETWORK)
    if has(exceptions.ConnectTimeoutError, requests.ConnectTimeout):
        return Failure("a host that does not answer: the connection timed out", NETWORK)
    if has(exceptions.ReadTimeoutError, requests.ReadTimeout):
        return Failure("silence: the answer timed out", f"try again later, or {NETWORK}")
    if has(requests.TooManyRedirects):
        return Failure("redirects without end", REGISTRY)
    if isinstance(last, BadStatusLine) and not isinstance(last, RemoteDisconnected):
        return Failure("an answer that is not HTTP", REGISTRY)
    if has(*BROKEN):
        return Failure(f"a connection that broke: {detail}", f"try again, or {NETWORK}", True)
    if isinstance(error, MALFORMED) and not isinstance(error, ADDRESSES):
        return Failure("an answer, or a call for a login, that cannot be read", REGISTRY)
    return Failure(without_query(detail), REGISTRY)


def without_query(text: str) -> str:
    """A text without the queries of its addresses. Where a registry keeps its blobs elsewhere, it
    is the query that lets clients in there."""
    return QUERY.sub("?…", text)


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what it came of, the innermost last: libraries hand that on as `reason`, among
    the arguments, or as the cause."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        inner = (getattr(error, "reason", None), *error.args, error.__cause__)
        error = next((one for one in inner if isinstance(one, BaseException)), None)
    return chain


def _of_proxy(detail: str) -> Failure:
    if (answer := TUNNEL.search(detail)) is None:
        return Failure(f"a proxy that takes no connection: {detail}", "check HTTPS_PROXY")
    remedy = "try again later, or check HTTPS_PROXY and NO_PROXY"
    return Failure(f"a proxy that answers {answer[1]}", remedy, answer[1].startswith("5"))


def _of_tls(last: BaseException, detail: str) -> Failure:
    if isinstance(last, ssl.SSLCertVerificationError):
        found = f"a certificate that is not trusted here: {last.verify_message.rstrip('.')}"
        return Failure(found, CERTIFICATES)
    found = f"no TLS that is understood here: {getattr(last, 'reason', None) or detail}"
    return Failure(found, f"name its host in {PLAIN_HTTP} if it speaks http alone")
