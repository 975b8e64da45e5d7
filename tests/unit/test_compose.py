"""Two maps composed into one: exact where the algebra is, at the cost of a direct map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from awareness_vllm.align.realign import realign
from awareness_vllm.anchors.corpus import Document
from awareness_vllm.errors import BadInput, NoWMatrix, UnsupportedModel
from awareness_vllm.evaluate.flops import map_flop
from awareness_vllm.fit import compose as compose_module
from awareness_vllm.fit import gather
from awareness_vllm.fit.compose import Hop, compose, learn_bridge
from awareness_vllm.fit.config import FitConfig
from awareness_vllm.fit.fit import fit
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.models.tokens import tokenize
from awareness_vllm.packages.capture import capture
from awareness_vllm.packages.file import Package, build
from awareness_vllm.wmatrix.features import flat_states, state_columns
from awareness_vllm.wmatrix.file import WMatrix, load
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox jumps over the lazy dog, naïve dogs look on"


def model(name: str, *shapes: tuple[int, int], hidden: int = 6) -> Geometry:
    """A model of layers of so many heads and dims; float32, so that nothing is rounded between."""
    return Geometry(
        name=name,
        model_type="llama",
        dtype="float32",
        hidden_size=hidden,
        vocab_size=1000,
        max_positions=512,
        layers=tuple(
            LayerGeometry(
                heads=h, head_dim=d, positions=Positions(scheme="rope", theta=1e4, rotary_dim=d)
            )
            for h, d in shapes
        ),
        weights=name * 8,
        tokenizer="t" * 64,
    )


A = model("a", (2, 4), (1, 8), (3, 4))
B = model("b", (1, 4), (2, 6), hidden=5)
C = model("c", (3, 2), (1, 4), (1, 4))
A2 = A.model_copy(update={"name": "a2", "weights": "A" * 8})
A3 = A.model_copy(update={"name": "a3", "weights": "Z" * 8})


def random_map(
    source: Geometry,
    target: Geometry,
    layers: tuple[int, ...],
    *,
    rank: int = 7,
    predecessors: int | None = 1,
    residual: bool = False,
    tokens: bool = True,
) -> WMatrix:
    """A random map; without `tokens` it reads the target's embeddings and makes nothing of them."""
    generator = torch.Generator().manual_seed(len(source.name + target.name) + rank)
    manifest = WMatrixManifest(
        source=source,
        target=target,
        layers=layers,
        rank=rank,
        predecessors=predecessors,
        residual=residual,
        sink=(2,),
        anchors=Anchors(digest="d", documents=1, tokens=10),
        fit={},
        r2={},
        reconstruction_error=0.1,
        versions={},
    )
    features = manifest.source_width + manifest.embedding_width

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    encode = random(features, rank) / features**0.5
    if not tokens:
        encode[manifest.source_width :] = 0
    return WMatrix(
        manifest,
        mean=random(features),
        scale=random(features).abs() + 0.5,
        encode=encode,
        decode=random(rank, target.width),
        bias=random(target.width),
        sink_keys=[random(1, g.heads, g.head_dim) for g in target.layers],
        sink_values=[random(1, g.heads, g.head_dim) for g in target.layers],
    )


def flat(states: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    return torch.cat([s.flatten(1) for part in states for s in part], dim=1)


def chained(
    first: WMatrix, second: WMatrix, states: Tensor, tokens: Tensor, masked: Tensor
) -> Tensor:
    """One map after the other; the first one reads tokens that say nothing."""
    nothing = first.mean[first.manifest.source_width :].expand(len(states), -1)
    columns = state_columns(second.manifest.source, second.manifest.layers)
    middle = flat(first.map(states, nothing, masked))[:, columns]
    return flat(second.map(middle, tokens))


PAIRS = {
    "plain": (random_map(A, B, (0, 2)), random_map(B, C, (1,))),
    "second reads no tokens": (random_map(A, B, (0, 2)), random_map(B, C, (0,), predecessors=None)),
    "neither reads tokens": (
        random_map(A, B, (1,), predecessors=None),
        random_map(B, C, (0, 1), predecessors=None),
    ),
    "first adds": (random_map(A, A2, (0, 1, 2), residual=True), random_map(A2, C, (0, 2))),
    "second adds": (random_map(B, A, (1,)), random_map(A, A2, (0, 1, 2), residual=True)),
    "both add": (
        random_map(A, A2, (0, 1, 2), residual=True, rank=3),
        random_map(A2, A3, (0, 1, 2), residual=True),
    ),
}


@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_the_composition_is_one_map_after_the_other(first: WMatrix, second: WMatrix) -> None:
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(9, first.manifest.source_width, generator=generator)
    tokens = torch.randn(9, second.manifest.embedding_width, generator=generator)
    masked = torch.arange(9) == 0
    composed_map = compose(first, second, rank=first.manifest.rank + second.manifest.rank)
    expected = chained(first, second, states, tokens, masked)
    torch.testing.assert_close(flat(composed_map.map(states, tokens, masked)), expected)
    assert composed_map.manifest.residual == (first.manifest.residual and second.manifest.residual)


def test_three_maps_compose_one_by_one() -> None:
    one, two, three = random_map(A, B, (0,)), random_map(B, C, (0, 1)), random_map(C, A2, (1,))
    left, right = compose(compose(one, two), three), compose(one, compose(two, three))
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(4, 16, generator=generator)
    tokens = torch.randn(4, three.manifest.embedding_width, generator=generator)
    # Folded from the left, the middle's tokens are bridged twice; the mean is the mean either way.
    torch.testing.assert_close(
        flat(left.map(states, tokens)), flat(right.map(states, tokens)), atol=1e-4, rtol=1e-4
    )
    assert left.manifest.composed == (one.payload, two.payload, three.payload)
    assert right.manifest.composed == left.manifest.composed


def test_it_costs_what_a_direct_map_of_that_rank_costs() -> None:
    first, second = PAIRS["plain"]
    direct = random_map(A, C, (0, 2), rank=second.manifest.rank)
    assert map_flop(compose(first, second)) == map_flop(direct)
    adds = compose(*PAIRS["second adds"])
    assert map_flop(adds) == map_flop(random_map(B, A2, (1,), rank=7))


def test_it_is_an_uncertified_file_like_any_other(tmp_path: Path) -> None:
    first, second = PAIRS["plain"]
    composed_map = compose(first, second)
    composed_map.save(tmp_path / "f.wmatrix")
    result = load(tmp_path / "f.wmatrix")
    manifest = result.manifest
    assert torch.equal(result.encode, composed_map.encode)
    assert (manifest.source, manifest.target, manifest.sink) == (A, C, (2,))
    assert manifest.composed == (first.payload, second.payload)
    assert (manifest.standing, result.accuracy, result.reconstruction_error) == (
        "not certified",
        None,
        None,
    )


def test_a_lower_rank_keeps_the_largest_components() -> None:
    first, second = PAIRS["second adds"]
    whole = compose(first, second, rank=14)
    product = whole.encode @ whole.decode
    spread = product.norm(dim=0)
    tail = torch.linalg.svdvals(product / spread)[5:]
    cut = compose(first, second, rank=5)
    assert cut.encode.shape[1] == cut.manifest.rank == 5
    lost = (product - cut.encode @ cut.decode) / spread
    assert lost.norm().item() == pytest.approx(tail.norm().item(), rel=1e-3)


def test_maps_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(NoWMatrix, match=r"leads to b .* begins at c"):
        compose(random_map(A, B, (0,)), random_map(C, A, (0,)))


def own_embedding(seed: int, width: int) -> Callable[[Tensor], Tensor]:
    table = torch.randn(1000, width, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


def captured(tokenizer: Tokenizer) -> Package:
    """A's package of the text, its own first token before it."""
    tokens = tokenize(tokenizer, TEXT)
    ids = [2, *tokens.ids]
    generator = torch.Generator().manual_seed(1)
    keys, values = (
        [torch.randn(len(ids), g.heads, g.head_dim, generator=generator) for g in A.layers]
        for _ in range(2)
    )
    spans = np.concatenate((np.zeros((1, 2), np.int64), tokens.spans))
    return packed(A, ids, spans, keys, values)


def packed(
    geometry: Geometry, ids: list[int], spans: np.ndarray, keys: list[Tensor], values: list[Tensor]
) -> Package:
    return build(
        geometry=geometry,
        text=TEXT,
        tokens=ids,
        spans=spans,
        keys=keys,
        values=values,
        engine="transformers",
        versions={},
    )


def test_memories_are_the_same_through_the_composition_and_through_both(
    folder: Path, byte_fallback_tokenizer: Tokenizer
) -> None:
    """One tokenizer for all three, no embeddings in the first map: exact, positions and all."""
    first, second = random_map(A, B, (0, 2), tokens=False), random_map(B, C, (0, 1))
    embeds = own_embedding(1, 5), own_embedding(2, 6)
    package = captured(byte_fallback_tokenizer)
    middle = realign(package, first, folder, embeds[0], dtype=torch.float32)
    between = packed(B, middle.ids, package.spans, middle.keys, middle.values)
    expected = realign(between, second, folder, embeds[1], dtype=torch.float32)
    result = realign(package, compose(first, second), folder, embeds[1], dtype=torch.float32)
    assert result.ids == expected.ids
    for one, other in zip(
        result.keys + result.values, expected.keys + expected.values, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def hops(
    tiny_models: tuple[Path, Path], anchors: list[Document]
) -> tuple[Hop, Hop, Callable[[Tensor], Tensor]]:
    """The tiny source, the tiny target, and back: two fitted maps, and the source's embedding."""
    a, b = tiny_models
    config = FitConfig(tokens=1000, rank=8, predecessors=0, calibration=0, held_out=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        first, second = (fit(*pair, anchors, config, progress=False) for pair in ((a, b), (b, a)))
    models = load_model(a), load_model(b)
    return Hop(first, a, models[0]), Hop(second, b, models[1]), models[0].get_input_embeddings()


def unlike(hop: Hop, embed: Callable[[Tensor], Tensor], composed_map: WMatrix, text: str) -> float:
    """The distance of a composed round trip's states from the model's own, relative to these."""
    package = capture(hop.folder, text, model=hop.model)
    memory = realign(package, composed_map, hop.folder, embed, dtype=torch.float32)
    keys, values = states(hop.model, memory.ids)
    result, own = (
        flat_states(package.geometry, *part)[1:]
        for part in ((memory.keys, memory.values), (keys, values))
    )
    return ((result - own).norm() / (own - own.mean(0)).norm()).item()


@pytest.mark.slow
def test_a_bridge_ignores_noise_in_the_first_maps_outputs(
    hops: tuple[Hop, Hop, Callable[[Tensor], Tensor]], anchors: list[Document]
) -> None:
    """Noise in outputs that B does not feel goes through the algebra, as through the chain."""
    first, second, embed = hops
    noisy = replace(first.wmatrix, decode=first.wmatrix.decode.clone())
    columns = state_columns(second.wmatrix.manifest.source, second.wmatrix.manifest.layers)
    noise = torch.randn(len(columns), generator=torch.Generator().manual_seed(0))
    noisy.decode[:, columns] += (1000 * noisy.decode.std() * noise).bfloat16()
    first = replace(first, wmatrix=noisy)
    bridge = learn_bridge(first, second, first.folder, embed, anchors[1:], rows=1000)
    assert bridge.rows >= 1000
    text = anchors[0].text[:400]
    compositions = [compose(noisy, second.wmatrix, bridge=b) for b in (None, bridge)]
    assert compositions[1].manifest.fit == {"bridge_rows": bridge.rows}
    algebra, bridged = (unlike(first, embed, composed_map, text) for composed_map in compositions)
    assert bridged < 0.5 < 1.5 < algebra


def test_a_bridge_has_the_units_of_its_features(
    hops: tuple[Hop, Hop, Callable[[Tensor], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, embed = hops
    generator = torch.Generator().manual_seed(0)
    ranks = first.wmatrix.manifest.rank, second.wmatrix.manifest.rank
    weight = torch.randn(ranks[0] + 5, ranks[1], generator=generator)
    spread = torch.linspace(0.1, 10, len(weight))
    x = torch.randn(2000, len(weight), generator=generator) * spread + 3
    monkeypatch.setattr(compose_module, "bridge_rows", lambda *args: iter([(x, x @ weight + 7)]))
    bridge = learn_bridge(first, second, first.folder, embed, [])
    result = torch.cat((bridge.states, bridge.tokens)) * spread[:, None]
    assert (result - weight * spread[:, None]).norm() < 0.05 * result.norm()
    torch.testing.assert_close(
        x.mean(0) @ torch.cat((bridge.states, bridge.tokens)) + bridge.bias,
        (x @ weight + 7).mean(0),
        atol=0.05,
        rtol=0.01,
    )


def test_no_bridge_follows_a_residual_map(
    hops: tuple[Hop, Hop, Callable[[Tensor], Tensor]], anchors: list[Document]
) -> None:
    first, second, embed = hops
    manifest = first.wmatrix.manifest.model_copy(update={"residual": True})
    adds = replace(first, wmatrix=replace(first.wmatrix, manifest=manifest))
    with pytest.raises(BadInput, match="without a bridge"):
        learn_bridge(adds, second, first.folder, embed, anchors)


def test_too_few_texts_are_refused(
    hops: tuple[Hop, Hop, Callable[[Tensor], Tensor]],
) -> None:
    first, second, embed = hops
    with pytest.raises(BadInput, match="no usable tokens"):
        learn_bridge(first, second, first.folder, embed, [])


def test_maps_with_position_embeddings_are_not_composed(wmatrix: WMatrix) -> None:
    placed = replace(
        wmatrix, manifest=wmatrix.manifest.model_copy(update={"position_embeddings": ("target",)})
    )
    back = replace(
        wmatrix,
        manifest=wmatrix.manifest.model_copy(
            update={"source": wmatrix.manifest.target, "target": wmatrix.manifest.source}
        ),
    )
    with pytest.raises(UnsupportedModel, match="position embeddings"):
        compose(placed, back)
