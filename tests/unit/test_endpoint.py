"""A source behind an endpoint: the route that gives a captured package, and the client of the fit.

The client talks to a small HTTP server that captures with transformers; the real one is in
tests/engine/test_smollm2_server.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from memories_server import LOAD, UNKNOWN, Make, Server, allow_captures
from pulls_server import serve
from registry_server import Handler, serving

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import (
    AwarenessError,
    BadInput,
    CaptureNotAllowed,
    PackageCorrupt,
    Unauthorized,
    UnsupportedModel,
)
from awareness_vllm.fit import gather
from awareness_vllm.fit.endpoint import Endpoint
from awareness_vllm.fit.reader import Reader
from awareness_vllm.fit.trainer import WMatrixTrainer
from awareness_vllm.marketplace.files import push_file
from awareness_vllm.oci.connect import open_repository
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import publish
from awareness_vllm.wmatrix.file import WMatrix

pytestmark = pytest.mark.unit

PACKAGE = "GET /{}/package"


def test_a_captured_packages_file_is_fetched_byte_for_byte(
    server: Server, make_package: Make
) -> None:
    memory = server.publish(make_package())
    refused = server.call(PACKAGE, memory)
    assert refused.status_code == 403
    assert "--allow-capture" in refused.text
    allow_captures(server)
    answer = server.call(PACKAGE, memory)
    assert answer.status_code == 200
    assert answer.content == server.path(memory).read_bytes()
    assert answer.headers["content-length"] == str(len(answer.content))


def test_what_is_not_the_callers_own_capture_is_not_given(
    server: Server, make_package: Make, tmp_path: Path
) -> None:
    allow_captures(server)
    foreign = server.publish(make_package(), "umbrella")
    theirs, nobodys = (server.call(PACKAGE, memory) for memory in (foreign, UNKNOWN))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.text.replace(foreign, UNKNOWN) == nobodys.text
    assert server.call(PACKAGE, "nothing").status_code == 400
    # No other test seals these bytes in this home.
    placed = publish(make_package("put there by hand"), server.stores / "acme", sealed=False)
    answer = server.call(PACKAGE, placed.stem)
    assert answer.status_code == 400
    assert "captured on this server" in answer.json()["error"]["message"]
    elsewhere = tmp_path / "elsewhere"
    memory = server.publish(make_package(seed=6))
    server.path(memory).rename(elsewhere)
    server.path(memory).symlink_to(elsewhere)
    assert server.call(PACKAGE, memory).status_code == 422


def test_what_a_registry_has_is_not_given_though_it_was_captured_here(
    make_package: Make, tmp_path: Path, tiny_models: tuple[Path, Path], wmatrix: WMatrix
) -> None:
    path, layout = publish(make_package(), tmp_path / "author"), tmp_path / "layout"
    push_file(path, open_repository(layout))
    for server in serve(tmp_path, layout, tiny_models[1], wmatrix):
        allow_captures(server)
        assert server.call(LOAD, path.stem).status_code == 200
        refused = server.call(PACKAGE, path.stem)
        assert (refused.status_code, "registry" in refused.text) == (400, True)


@pytest.fixture
def endpoint(tiny_models: tuple[Path, Path], tmp_path: Path) -> Iterator[Any]:
    """The URL of a server of the tiny source; `answers` are put in the place of its own."""

    class Answering(Handler):
        answers: ClassVar[dict[str, tuple[int, bytes]]] = {}

        def do_GET(self) -> None:
            if self.path == "/v1/models":
                return self.answer("models", b'{"data": [{"id": "tiny"}]}')
            memory = self.path.split("/")[3]
            return self.answer("package", (tmp_path / f"{memory}.safetensors").read_bytes())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = publish(capture(tiny_models[0], body["prompt"]), tmp_path)
            return self.answer("capture", json.dumps({"memory": {"id": path.stem}}).encode())

        def answer(self, name: str, content: bytes) -> None:
            status, content = self.answers.get(name, (200, content))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with serving(Answering) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        server.answers = Answering.answers  # type: ignore[attr-defined]
        yield server


def test_rows_of_an_endpoint_are_those_of_the_model(
    endpoint: Any, tiny_models: tuple[Path, Path], anchors: list[Document]
) -> None:
    trainer = WMatrixTrainer("tiny", tiny_models[1], source_endpoint=endpoint.url + "/v1/")
    there, here = trainer.reader(trainer.config), Reader(*tiny_models, 3)
    assert there is not None
    assert there.layers == here.layers
    text = anchors[0].text[:300]
    rows, local = there.read(text), here.read(text)
    assert rows.ids == local.ids
    # The reader's model is in bfloat16, the capture's in float32.
    torch.testing.assert_close(rows.features, local.features, atol=0.1, rtol=0.05)
    texts = [there.tokeniser.text(anchors[n].text[: 200 + 100 * n]) for n in range(3)]
    together = there.features(texts)[0]
    apart = torch.cat([there.features([one])[0] for one in texts])
    torch.testing.assert_close(together, apart)


@pytest.mark.slow
def test_a_map_is_learned_through_an_endpoint(
    endpoint: Any,
    tiny_models: tuple[Path, Path],
    anchors: list[Document],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gather, "CHUNK_ROWS", 256)
    files = [tmp_path / f"{document.name}.txt" for document in anchors]
    for path, document in zip(files, anchors, strict=True):
        path.write_text(document.text)
    trainer = WMatrixTrainer("tiny", tiny_models[1], source_endpoint=endpoint.url)
    trainer.configure(num_anchors=600, anchors=files, rank=4, calibration=2)
    learned = trainer.train(validation_split=0.3, progress=False)
    local = WMatrixTrainer(*tiny_models).configure(
        num_anchors=600, anchors=files, rank=4, calibration=2
    )
    expected = local.train(validation_split=0.3, progress=False).manifest
    assert learned.manifest.source.same_model(expected.source)
    assert learned.manifest.anchors == expected.anchors
    assert learned.manifest.r2 == pytest.approx(expected.r2, abs=0.05)


@pytest.mark.parametrize(
    ("name", "answer", "error", "says"),
    [
        ("models", (200, b"<html>"), BadInput, "no vLLM server"),
        ("models", (200, b"[]"), BadInput, "no vLLM server"),
        ("models", (200, b'{"data": []}'), UnsupportedModel, "does not serve"),
        ("models", (401, b""), Unauthorized, "api_key"),
        ("capture", (403, b""), CaptureNotAllowed, "--allow-capture"),
        ("capture", (400, b"too long"), BadInput, "too long"),
        ("capture", (200, b"{}"), AwarenessError, "mem_"),
        ("capture", (200, b'{"memory": {"id": "../../etc/passwd"}}'), AwarenessError, "mem_"),
        ("package", (404, b""), BadInput, "404"),
        ("package", (200, b"not a package"), PackageCorrupt, "cannot be used"),
    ],
)
def test_what_an_endpoint_may_answer_instead_is_a_typed_error(
    endpoint: Any, name: str, answer: tuple[int, bytes], error: type[Exception], says: str
) -> None:
    endpoint.answers[name] = answer
    with pytest.raises(error, match=says):
        Endpoint(endpoint.url, "tiny")


def test_another_model_behind_the_endpoint_is_noticed(
    endpoint: Any, make_package: Callable[..., Any], tmp_path: Path
) -> None:
    source = Endpoint(endpoint.url, "tiny")
    other = publish(make_package("a text"), tmp_path)
    endpoint.answers["capture"] = (200, json.dumps({"memory": {"id": other.stem}}).encode())
    with pytest.raises(BadInput, match="something else"):
        source.package("a text")


def test_no_server_and_no_target_are_refused(tiny_models: tuple[Path, Path]) -> None:
    with pytest.raises(BadInput, match="no vLLM server"):
        WMatrixTrainer("tiny", tiny_models[1], source_endpoint="http://127.0.0.1:9")
    with pytest.raises(UnsupportedModel, match="gradients") as caught:
        WMatrixTrainer(tiny_models[0], "llama-3.1-70b", target_endpoint="http://127.0.0.1:9")
    assert "embeddings" in str(caught.value)
