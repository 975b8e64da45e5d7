"""Logins to a real registry: none, basic, tokens, docker's configuration and its helpers."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from registry_server import (
    PASSWORD,
    USER,
    RegistryServer,
    TokenServer,
    basic_auth,
    registry_server,
    token_auth,
    token_server,
)

from awareness_vllm.errors import RegistryDenied, RegistryError
from awareness_vllm.oci.artefact import Layer, descriptor_of
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.oci.repository import Repository

pytestmark = [pytest.mark.unit, pytest.mark.slow]
LOGIN = f"{USER}:{PASSWORD}"
BLOB = Layer(b"content", descriptor_of(b"content", "application/octet-stream"))


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    folder = tmp_path_factory.mktemp("basic")
    with registry_server(folder, basic_auth(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def tokens() -> Iterator[TokenServer]:
    with token_server() as server:
        yield server


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory, tokens: TokenServer) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("token")
    with registry_server(folder, token_auth(folder, tokens)) as server:
        yield server.reference()


@pytest.fixture(autouse=True)
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration: an empty one, not the user's."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "config.json"


def exchange(repository: Repository) -> None:
    """A blob there and back."""
    repository.upload(BLOB)
    assert repository.blob(BLOB.descriptor, 100) == b"content"


def test_basic_authentication(basic: RegistryServer) -> None:
    exchange(open_repository(basic.reference(), api_key=LOGIN))


@pytest.mark.parametrize("api_key", [None, f"{USER}:wrong"])
def test_a_wrong_login_is_denied(basic: RegistryServer, token: str, api_key: str | None) -> None:
    for reference in (basic.reference(), token):
        with pytest.raises(RegistryDenied, match="docker login"):
            open_repository(reference, api_key=api_key).upload(BLOB)


@pytest.mark.parametrize(
    ("api_key", "found", "remedy"),
    [
        (None, "no login: 401", "docker login"),
        (f"{USER}:wrong", "a user and password that it does not accept: 401", "check both"),
        ("secret", "a token that it does not accept: 401", "a new token"),
    ],
)
def test_a_refusal_says_what_was_sent(
    basic: RegistryServer, token: str, api_key: str | None, found: str, remedy: str
) -> None:
    for reference in (basic.reference(), token):
        with pytest.raises(RegistryDenied) as denied:
            open_repository(reference, api_key=api_key).upload(BLOB)
        assert str(denied.value.found).startswith(found)
        assert remedy in str(denied.value.remedy)
        for secret in (USER, "wrong", "secret"):
            assert secret not in str(denied.value)


def test_a_token_that_expired_says_when(token: str, tokens: TokenServer) -> None:
    tokens.lifetime = -3600
    try:
        expired = tokens.token(["repository:team/memories:pull,push"])
        with pytest.raises(RegistryDenied, match=r"a token that expired at 20\d\d-.*a new token"):
            exchange(open_repository(token, api_key=expired))
        with pytest.raises(RegistryDenied, match=r"just made.*clocks"):
            exchange(open_repository(token, api_key=LOGIN))
    finally:
        tokens.lifetime = 60


def test_a_login_that_may_do_less_says_so(token: str, tokens: TokenServer) -> None:
    less = tokens.token(["repository:team/memories:pull"])
    with pytest.raises(RegistryDenied, match=r"a token that may not do this: 401.*for the right"):
        open_repository(token, api_key=less).upload(Layer(b"y", descriptor_of(b"y", "text/plain")))


def test_docker_has_logged_in(basic: RegistryServer, docker: Path) -> None:
    auth = base64.b64encode(LOGIN.encode()).decode()
    docker.write_text(json.dumps({"auths": {basic.host: {"auth": auth}}}))
    exchange(open_repository(basic.reference()))


def test_the_environment_s_key_is_for_the_environment_s_registry(
    basic: RegistryServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWARENESS_REGISTRY_KEY", LOGIN)
    with pytest.raises(RegistryDenied):
        exchange(open_repository(basic.reference()))
    monkeypatch.setenv("AWARENESS_REGISTRY", basic.reference("others"))
    exchange(open_repository(basic.reference()))


def test_a_credential_helper_knows_the_login(
    basic: RegistryServer, docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = docker.with_name("docker-credential-test")
    helper.write_text(f'#!/bin/sh\necho \'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\'\n')
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{docker.parent}{os.pathsep}{os.environ['PATH']}")
    docker.write_text(json.dumps({"credHelpers": {basic.host: "test"}}))
    exchange(open_repository(basic.reference()))


@pytest.mark.parametrize("content", ["{", "[]", '{"auths": 1}', '{"auths": {"HOST": 1}}'])
def test_a_broken_docker_configuration_is_an_error(
    basic: RegistryServer, docker: Path, content: str
) -> None:
    docker.write_text(content.replace("HOST", basic.host))
    with pytest.raises(RegistryError, match="docker"):
        open_repository(basic.reference())


def test_a_token_for_what_is_done(token: str, tokens: TokenServer) -> None:
    tokens.asked.clear()
    repository = open_repository(token, api_key=LOGIN)
    assert list(repository.tags()) == []
    exchange(repository)
    # The token for reading does not do for writing: another one is asked for, once.
    asked = [scope.rpartition(":")[2].split(",") for scope in tokens.asked]
    assert [sorted(actions) for actions in asked] == [["pull"], ["pull", "push"]]


def test_an_expired_token_is_replaced(token: str, tokens: TokenServer) -> None:
    repository = open_repository(token, api_key=LOGIN)
    tokens.lifetime = -61
    with pytest.raises(RegistryDenied):
        exchange(repository)
    tokens.lifetime = 60
    exchange(repository)


def test_a_token_of_ones_own(token: str, tokens: TokenServer) -> None:
    exchange(open_repository(token, api_key=tokens.token(["repository:team/memories:pull,push"])))
    with pytest.raises(RegistryDenied, match="let you in"):
        exchange(open_repository(token, api_key=tokens.token(["repository:other:pull"])))


def test_anyone_may_read(token: str, tokens: TokenServer) -> None:
    exchange(open_repository(token, api_key=LOGIN))
    tokens.open = True
    assert open_repository(token).blob(BLOB.descriptor, 100) == b"content"
    with pytest.raises(RegistryDenied):
        open_repository(token).upload(Layer(b"x", descriptor_of(b"x", "text/plain")))
    tokens.open = False
