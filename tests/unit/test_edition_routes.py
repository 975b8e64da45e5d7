"""`POST /v1/memories/ID/edition`, and what lists, manifests and evictions say of editions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from memories_server import DELETE, UNKNOWN, Make, Server
from pydantic import ValidationError
from safetensors.torch import save_file

from awareness_vllm.cli.main import main
from awareness_vllm.files import file_digest
from awareness_vllm.packages.file import Package, build, publish, read
from awareness_vllm.packages.manifest import tensor_name
from awareness_vllm.packages.origin import is_own
from awareness_vllm.serving.connector.kv_reader import CAPTURE_KEY
from awareness_vllm.serving.connector.worker_extension import ANNOUNCE, FORGET, STATE
from awareness_vllm.serving.params import EDITION
from awareness_vllm.serving.storage import CaptureLimits

pytestmark = pytest.mark.unit

MAKE = "POST /{}/edition"


@pytest.fixture
def capturing(server: Server) -> Server:
    """A server that allows captures, and whose engine computes zeros."""
    front = server.app.state.awareness
    object.__setattr__(front, "capture_limits", CaptureLimits(allowed=True, min_free=0))
    server.engine.answers |= {ANNOUNCE: [None], FORGET: [None], STATE: [""]}

    async def generate(prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
        asked = params.extra_args["kv_transfer_params"][CAPTURE_KEY]
        assert asked["begin"] == 0
        states = {
            tensor_name(i, part): torch.zeros(
                len(prompt["prompt_token_ids"]), layer.heads, layer.head_dim
            ).bfloat16()
            for i, layer in enumerate(server.resolver.model.geometry.layers)
            for part in ("key", "value")
        }
        save_file(states, front.engine_client.scratch.path / f"{asked['name']}.safetensors")
        yield None

    server.engine.generate = generate  # type: ignore[attr-defined]
    return server


def test_an_edition_is_a_memory_of_this_model_with_a_link(
    capturing: Server, make_package: Make
) -> None:
    original = capturing.publish(make_package())
    made = capturing.call(MAKE, original)
    assert made.status_code == 200, made.text
    edition = made.json()
    assert (edition["object"], edition["edition_of"]) == ("memory.edition", original)
    package = read(capturing.path(edition["id"]))
    assert package.text == "hello wörld"
    assert edition["tokens"] == package.manifest.tokens
    assert package.geometry.same_model(capturing.resolver.model.geometry)
    assert is_own(file_digest(capturing.path(edition["id"])))
    listed = {one["id"]: one["edition_of"] for one in capturing.get()["data"]}
    assert listed == {original: None, edition["id"]: original}
    resolved = capturing.resolver.resolve_one(edition["id"], "acme")
    assert (resolved.wmatrix, resolved.origin) == (None, "own")
    assert capturing.admission.loads == {}


def test_what_has_no_edition_is_refused(capturing: Server, make_package: Make) -> None:
    original = capturing.publish(make_package())
    own = capturing.call(MAKE, original).json()["id"]
    refused = capturing.call(MAKE, own)
    assert (refused.status_code, "own states" in refused.text) == (400, True)
    assert capturing.call(MAKE, UNKNOWN).status_code == 404
    assert capturing.call(MAKE, original, tenant="umbrella").status_code == 404
    assert capturing.call(MAKE, capturing.publish(make_package("x" * 400))).status_code == 400
    object.__setattr__(capturing.app.state.awareness, "capture_limits", CaptureLimits())
    off = capturing.call(MAKE, original)
    assert (off.status_code, "--allow-capture" in off.text) == (403, True)


def test_a_kept_edition_is_listed_until_the_memory_is_given_up(
    server: Server, make_package: Make
) -> None:
    memory = server.publish(make_package())
    editions = server.app.state.awareness.editions
    editions._known((file_digest(server.path(memory)), EDITION)).kept = True
    (one,) = server.get()["data"]
    assert (one["edition"], server.get(memory)["edition"]) == (True, True)
    assert server.call(DELETE, memory).status_code == 200
    (one,) = server.get()["data"]
    assert not one["edition"]


def edition_of(package: Package, original: str | None) -> Package:
    fields = ("geometry", "text", "tokens", "spans", "keys", "values")
    states: Any = {name: getattr(package, name) for name in fields}
    return build(**states, engine="vllm", versions={}, edition_of=original)


def test_a_package_names_its_original_or_nothing(
    make_package: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    package = make_package()
    with pytest.raises(ValidationError, match="edition_of"):
        edition_of(package, "../mem")
    assert "edition_of" not in package.manifest.model_dump_json()
    path = publish(edition_of(package, UNKNOWN), tmp_path)
    assert read(path).manifest.edition_of == UNKNOWN
    assert main(["list", "--store", str(tmp_path)]) == 0
    assert f"edition of {UNKNOWN}" in capfd.readouterr().out
    assert main(["list", "--store", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["memories"]
    assert row["edition_of"] == UNKNOWN
