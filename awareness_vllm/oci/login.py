"""Logins to registries: what is sent, and what a refusal of it means."""

from __future__ import annotations

import base64
import datetime
import json
from urllib.parse import urlsplit

import requests
from oras.auth.token import TokenAuth
from oras.auth.utils import parse_auth_header

from awareness_vllm.errors import RegistryDenied, escaped
from awareness_vllm.oci.failures import MALFORMED, without_query
from awareness_vllm.oci.reference import ENVIRONMENT, KEY, Reference


class Refused(Exception):
    """An answer that ends a request: no login of ours does for it, or the server of tokens has none
    to give."""

    def __init__(self, response: requests.Response) -> None:
        super().__init__()
        self.response = response


class Login(TokenAuth):
    """oras's login with tokens, which answers a challenge for basic authentication too, and asks
    for another token where the one that was sent has expired or does not reach far enough.

    Args:
        api_key: a token, or "user:password".
    """

    def __init__(self, api_key: str | None) -> None:
        super().__init__()
        self.given = api_key is not None and ":" not in api_key
        self.basic = False
        if self.given:
            self.set_token_auth(str(api_key))
        elif api_key is not None:
            self.set_basic_auth(*api_key.split(":", 1))

    @property
    def password(self) -> str | None:
        """User and password as they are sent, in base64."""
        return getattr(self, "_basic_auth", None)

    def get_auth_header(self) -> dict[str, str]:
        token = self.token
        return {"Authorization": f"{'Basic' if self.basic else 'Bearer'} {token}"} if token else {}

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str], refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        challenge = original.headers.get("Www-Authenticate", "")
        if self.given or not challenge:
            raise Refused(original)
        if challenge.lower().startswith("basic"):
            tried = original.request.headers.get("Authorization") == f"Basic {self.password}"
            if tried or not self.password:
                raise Refused(original)
            self.basic, self.token = True, self.password
        else:
            self.set_token_auth(self._token(challenge))
        return headers | self.get_auth_header(), True

    def _token(self, challenge: str) -> str:
        """A token for what a registry asks a login for. Raises Refused, ValueError."""
        parts = parse_auth_header(challenge)
        if not (realm := parts.realm):
            raise ValueError("neither basic authentication nor a server of tokens")
        asked = {"service": parts.service, "scope": parts.scope}
        headers = {"Authorization": f"Basic {self.password}"} if self.password else {}
        response = self.session.get(
            realm if realm.startswith("http") else f"{self.prefix}://{realm}",
            params={name: value for name, value in asked.items() if value},
            headers=headers,
        )
        if response.status_code != 200:
            raise Refused(response)
        info = response.json()
        token = info.get("token") or info.get("access_token")
        if not isinstance(token, str):
            raise ValueError("a server of tokens that gives none")
        return token


def denied(reference: Reference, login: Login, response: requests.Response) -> RegistryDenied:
    """The error about a 401 or a 403: there was no login, a wrong one, one that has expired, or one
    that may do less. Whose login it is stays here: a server's tenants read its errors."""
    again = f"`docker login {reference.host}`"
    challenge = response.headers.get("Www-Authenticate", "")
    lacks = response.status_code == 403 or "insufficient_scope" in challenge
    bearer = "Bearer" in str(response.request.headers.get("Authorization"))
    expected = "a login that may do this"
    if response.history:
        found, remedy = "storage that refuses its own link", "try again, or ask who runs it"
    elif not login.given and login.password is None:
        found = "no login"
        remedy = f"{again}, or a token or USER:PASSWORD in {KEY}, for the registry in {ENVIRONMENT}"
    elif lacks:
        found = f"a {'token' if login.given else 'login'} that may not do this"
        remedy = f"ask who runs it for the right, or {again} as another user"
    elif login.given:
        expiry = expiry_of(str(login.token))
        found = f"a token that expired at {expiry}" if expiry else "a token that it does not accept"
        remedy = f"a new token in {KEY}, or none there and {again}"
    elif bearer:
        found = "a token that was just made for the login, which it does not accept"
        remedy = "ask who runs it whether clocks differ: tokens expire early then"
    else:
        found = "a user and password that it does not accept"
        remedy = f"check both, in {KEY} or by {again}"
    return RegistryDenied(
        f"{reference} does not let you in",
        found=f"{found}: {complaint_of(response, reference)}",
        expected=expected,
        remedy=remedy,
    )


def complaint_of(response: requests.Response, reference: Reference) -> str:
    """A response's status, what it says of the error, and who answers if it is not the registry."""
    complaint = f"{response.status_code} {response.reason or ''}".strip()
    complaint += f" ({message})" if (message := _message(response)) else ""
    elsewhere = urlsplit(response.url).netloc != reference.host
    return escaped(complaint)[:300] + (f" from {without_query(response.url)}" if elsewhere else "")


def expiry_of(token: str) -> datetime.datetime | None:
    """When a token, if it is a JSON Web Token, has expired; None where it has not."""
    try:
        claims = token.split(".")[1]
        claims += "=" * (-len(claims) % 4)
        expiry = datetime.datetime.fromtimestamp(
            json.loads(base64.urlsafe_b64decode(claims))["exp"], datetime.UTC
        )
    except (*MALFORMED, OverflowError, OSError):
        return None  # it is of another kind
    return expiry if expiry < datetime.datetime.now(datetime.UTC) else None


def _message(response: requests.Response) -> str:
    """What a registry, or a server of tokens, says of an error."""
    try:
        document = json.loads(response.content)
        if "errors" not in document:
            return str(document.get("details") or "")
        return "; ".join(str(e.get("message") or e.get("code")) for e in document["errors"])
    except (*MALFORMED, requests.RequestException):
        return ""  # the status speaks for itself
    finally:
        response.close()
