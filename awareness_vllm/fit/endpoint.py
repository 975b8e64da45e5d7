"""A source model that runs behind a vLLM server with our plugin: what it makes of each anchor comes
by the server's captures, tokens and geometry with it."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor

from awareness_vllm.errors import (
    AwarenessError,
    BadInput,
    CaptureNotAllowed,
    Unauthorized,
    UnsupportedModel,
)
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.tokens import TextTokens, Tokeniser
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.models.tokens import Tokens
from awareness_vllm.packages.file import Package, read, with_states
from awareness_vllm.packages.manifest import check_id
from awareness_vllm.packages.store import digest_in

PROBE = "The quick brown fox jumps over the lazy dog."
"""A text by which a server's model is known."""
KEPT = 4
"""Packages in memory: a text is tokenised first and read after, some texts at once."""
SECONDS = 600
REFUSALS: dict[int, type[AwarenessError]] = {401: Unauthorized, 403: CaptureNotAllowed}
"""Seconds that one answer may take; and errors of their own among the server's."""


@dataclass
class Endpoint:
    """A server's model as a reader of texts.

    Args:
        url: of the server, without /v1.
        model: the name that it is served by; None for the only one.
        api_key: of a tenant, or of the whole server.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    packages: collections.OrderedDict[str, Package] = field(
        default_factory=collections.OrderedDict, repr=False
    )

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        self.session = requests.Session()
        if self.api_key is not None:
            self.session.headers["Authorization"] = f"Bearer {self.api_key}"
        served = [str(one["id"]) for one in self._json("GET", "/v1/models")["data"]]
        if self.model is None and len(served) == 1:
            self.model = served[0]
        if self.model not in served:
            raise UnsupportedModel(
                f"{self.url} does not serve {self.model or 'one model'}",
                found=", ".join(served) or "no model",
                expected="the name that the model is served by",
                remedy="give one of these names",
            )
        self.geometry: Geometry = self.package(PROBE).geometry

    def package(self, text: str) -> Package:
        """What the model makes of a text: captured by the server, its file fetched and verified.

        Raises:
            Unauthorized, CaptureNotAllowed; BadInput: no answer, or another refusal;
            PackageCorrupt: a file that is not the one of its ID.
        """
        if (known := self.packages.get(text)) is not None:
            self.packages.move_to_end(text)
            return known
        body = {"model": self.model, "prompt": text, "max_tokens": 1, "temperature": 0}
        capture = {"memory": {"capture": "an anchor of a fit"}}
        answer = self._json("POST", "/v1/completions", json=body | capture)
        memory = check_id((answer.get("memory") or {}).get("id"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{memory}.safetensors"
            with path.open("wb") as file:
                response = self._request("GET", f"/v1/memories/{memory}/package", stream=True)
                for chunk in response.iter_content(1 << 20):
                    file.write(chunk)
            package = with_states(read(path, digest=digest_in(memory)))
        self._check(package, text)
        self.packages[text] = package
        while len(self.packages) > KEPT:
            self.packages.popitem(last=False)
        return package

    def _check(self, package: Package, text: str) -> None:
        """Raises BadInput where a package is of another text or model, or lacks states."""
        before = getattr(self, "geometry", package.geometry)
        lacking = bool(package.manifest.first_tokens)
        if package.text != text or lacking or not package.geometry.same_model(before):
            raise BadInput(
                f"{self.url} captured something else",
                found=package.geometry.identity + ", without all states" * lacking,
                expected=f"{before.identity}, and all states of the text that was sent",
                remedy="keep one model behind the endpoint while the fit reads",
            )

    def _json(self, method: str, path: str, **parts: Any) -> dict[str, Any]:
        try:
            document = self._request(method, path, **parts).json()
        except requests.JSONDecodeError as error:
            raise self._no_server(f"no JSON ({error})") from error
        if not isinstance(document, dict):
            raise self._no_server(f"a JSON {type(document).__name__}")
        return document

    def _request(self, method: str, path: str, **parts: Any) -> requests.Response:
        try:
            response = self.session.request(method, self.url + path, timeout=SECONDS, **parts)
        except requests.RequestException as error:
            raise self._no_server(str(error)) from error
        if response.ok:
            return response
        raise REFUSALS.get(response.status_code, BadInput)(
            f"{self.url}{path} refuses",
            found=f"{response.status_code}: {response.text[:500]}",
            expected="a server with our plugin that allows captures, and room for the anchors",
            remedy="start it with `awareness serve --allow-capture`, with a --max-model-len of "
            "4096 or more, and give its api_key",
        )

    def _no_server(self, found: str) -> BadInput:
        return BadInput(
            f"no vLLM server at {self.url}", found=found[:300], remedy="check the endpoint"
        )


@dataclass(frozen=True)
class EndpointTokeniser(Tokeniser):
    """A tokeniser whose source tokens are those that the server read."""

    endpoint: Endpoint | None = None

    def source_tokens(self, text: str) -> Tokens:
        assert self.endpoint is not None
        package = self.endpoint.package(text)
        return Tokens(list(package.tokens), package.spans)


@dataclass
class EndpointReader(Reader):
    """A reader whose source is behind an endpoint; the target's model is in this process.

    Raises:
        UnsupportedModel: a source with learned positions, whose table no capture has.
    """

    endpoint: Endpoint | None = None

    def load_source(self) -> None:
        assert self.endpoint is not None
        self.source_geometry = self.endpoint.geometry
        if self.source_geometry.additive:
            raise UnsupportedModel(
                f"{self.source_geometry.name} cannot be read through an endpoint",
                found="learned positions, which the map takes off by the model's own table",
                expected="a model whose captures hold all that the map reads",
                remedy="give its folder as source_model, without source_endpoint",
            )

    def make_tokeniser(self) -> Tokeniser:
        settings = self.source, self.target, tuple(self.sink), self.predecessors
        return EndpointTokeniser(*settings, self.endpoint)

    def source_states(self, texts: Sequence[TextTokens]) -> tuple[list[Tensor], list[Tensor]]:
        assert self.endpoint is not None
        packages = [self.endpoint.package(text.text) for text in texts]
        sides = [(package.keys, package.values) for package in packages]
        keys, values = (
            [
                torch.nn.utils.rnn.pad_sequence(list(states), batch_first=True).to(self.device)
                for states in zip(*side, strict=True)
            ]
            for side in zip(*sides, strict=True)
        )
        return keys, values
