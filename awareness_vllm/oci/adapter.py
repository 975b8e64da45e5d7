"""Connections of `requests` whose requests end: by timeouts, at a deadline, after so many bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.client import HTTPResponse
from socket import socket
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool, PoolManager, ProxyManager
from urllib3.connection import HTTPConnection, HTTPSConnection

from awareness_vllm.oci.deadline import check_deadline, has_deadline, seconds_left

Timeout = tuple[float, float]
"""Seconds to wait for a connection, and for the next bytes."""
MAX_ANSWER = 8 << 20
"""Bytes of an answer that is read as a whole: manifests, tags, tokens, errors."""
CONNECTIONS = 16


class Adapter(HTTPAdapter):
    """Requests that end: oras sets no timeouts, and reads what it is sent."""

    def __init__(self, timeout: Timeout) -> None:
        self.timeout = timeout
        super().__init__(pool_maxsize=CONNECTIONS)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        _use_deadlines(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        if isinstance(manager, ProxyManager):  # those for SOCKS have connections of their own
            _use_deadlines(manager)
        return manager

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Any = None,
    ) -> requests.Response:
        left = seconds_left()
        limits = timeout or tuple(min(limit, left) for limit in self.timeout)
        response = super().send(request, stream, limits, verify, cert, proxies)
        response.raw = _Limited(response.raw)
        return response


class TooLong(requests.RequestException):
    """An answer that does not end."""


class _Limited:
    """An answer's body, of which what reads all of it gets MAX_ANSWER bytes at most."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def stream(self, amount: int, decode_content: bool = True) -> Iterator[bytes]:
        total = 0
        for chunk in self._raw.stream(amount, decode_content=decode_content):
            total += len(chunk)
            if total > MAX_ANSWER:
                self._raw.close()
                raise TooLong(f"an answer of more than {MAX_ANSWER} bytes")
            yield chunk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


class _Received(io.RawIOBase):
    """What a socket receives, until the deadline: a socket's own timeout begins anew with each
    byte, and so never ends for a server that sends one now and then, of a body or of a header."""

    def __init__(self, connection: socket, raw: io.RawIOBase) -> None:
        self.connection, self.raw, self.timeout = connection, raw, connection.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = seconds_left()
        self.connection.settimeout(left if self.timeout is None else min(left, self.timeout))
        try:
            return self.raw.readinto(buffer)
        except TimeoutError:
            check_deadline()
            raise
        finally:
            self.connection.settimeout(self.timeout)

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(HTTPResponse):
    def __init__(self, sock: socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        if has_deadline():
            self.fp = io.BufferedReader(_Received(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


def _use_deadlines(manager: PoolManager) -> None:
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _SecurePool}
