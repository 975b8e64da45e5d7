"""A map learned from a source that only a server has: SmolLM2 behind a real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import Server, serving

from awareness_vllm import WMatrixTrainer
from awareness_vllm.errors import Unauthorized, UnsupportedModel
from awareness_vllm.fit import gather
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.describe import geometry_of

pytestmark = [pytest.mark.engine, pytest.mark.nightly]


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one tenant, with the key that harness's client has."""
    folder = tmp_path_factory.mktemp("endpoint")
    (folder / "store").mkdir()
    tenants = folder / "tenants.json"
    tenants.write_text(json.dumps({"fit": {"api_keys": ["none"], "store": str(folder / "store")}}))
    flags = ("--tenants", tenants, "--allow-capture")
    yield from serving(smollm2, folder / "store", folder / "server.log", *flags)


def test_a_map_is_learned_from_a_source_that_only_a_server_has(
    server: Server, smollm2: Path, gemma3: Path, document: Callable[[int, int], str], tmp_path: Path
) -> None:
    texts = [tmp_path / f"{number}.txt" for number in range(12)]
    for number, path in enumerate(texts):
        path.write_text(document(400, number))
    trainer = WMatrixTrainer("served", gemma3, source_endpoint=server.url, api_key="none")
    assert trainer.source_geometry.same_model(geometry_of(smollm2))
    trainer.configure(num_anchors=1500, anchors=texts, layers=1, rank=32, calibration=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        learned = trainer.train(validation_split=0.2, progress=False)
    assert learned.manifest.source.same_model(geometry_of(smollm2))
    assert learned.manifest.anchors.tokens >= 1500
    # What the map reads is what transformers would have read, but for the engine's rounding.
    there, here = trainer.reader(trainer.config), Reader(smollm2, gemma3, 3, 1)
    assert there is not None
    rows, local = there.read(document(80, 3)), here.read(document(80, 3))
    assert rows.ids == local.ids
    width = here.width
    first, second = (r.features[2:, :width].double().flatten() for r in (rows, local))
    assert torch.corrcoef(torch.stack((first, second)))[0, 1] > 0.999
    assert torch.equal(rows.features[:, width:], local.features[:, width:])


def test_an_endpoint_that_cannot_help_is_refused(
    server: Server, smollm2: Path, gemma3: Path
) -> None:
    here = {"api_key": "none", "target_endpoint": server.url}
    assert WMatrixTrainer(gemma3, smollm2, **here).target == smollm2.resolve()
    with pytest.raises(UnsupportedModel, match="another model"):
        WMatrixTrainer(smollm2, gemma3, **here)
    with pytest.raises(UnsupportedModel, match="gradients"):
        WMatrixTrainer(smollm2, "llama-3.1-70b", **here)
    with pytest.raises(UnsupportedModel, match="served"):
        WMatrixTrainer("another", gemma3, source_endpoint=server.url, api_key="none")
    with pytest.raises(Unauthorized):
        WMatrixTrainer("served", gemma3, source_endpoint=server.url, api_key="nobody")
