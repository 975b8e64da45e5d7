"""Learned positions are features: in the reader, in the file, in a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paged_stubs import latent_of
from tokenizers import Tokenizer
from torch import Tensor

from awareness_vllm.align.paged import PagedMap
from awareness_vllm.align.realign import realign
from awareness_vllm.align.workspace import DeviceWorkspace
from awareness_vllm.errors import UnsupportedModel, WMatrixCorrupt
from awareness_vllm.fit.reader import Reader
from awareness_vllm.models.position_embeddings import position_embeddings
from awareness_vllm.packages.file import Package
from awareness_vllm.wmatrix.features import with_position_embeddings
from awareness_vllm.wmatrix.file import WMatrix, load

pytestmark = pytest.mark.unit

TEXT = "the quick brown fox, naïve dogs"


def embed(ids: Tensor) -> Tensor:
    return torch.randn(1000, 6, generator=torch.Generator().manual_seed(3))[ids]


@pytest.fixture(scope="module")
def package(make_package: Callable[..., Package]) -> Package:
    return make_package(TEXT)


@pytest.fixture(scope="module")
def placed(wmatrix: WMatrix) -> WMatrix:
    """The tiny map with the position embeddings of both sides among its features."""
    generator = torch.Generator().manual_seed(1)
    manifest = wmatrix.manifest.model_copy(update={"position_embeddings": ("source", "target")})
    tables = {
        side: torch.randn(*shape, generator=generator)
        for side, shape in manifest.position_embedding_shapes.items()
    }
    more = sum(table.shape[1] for table in tables.values())
    return replace(
        wmatrix,
        manifest=manifest,
        mean=torch.cat((wmatrix.mean, torch.zeros(more))),
        scale=torch.cat((wmatrix.scale, torch.ones(more))),
        encode=torch.cat((wmatrix.encode, torch.randn(more, 5, generator=generator))),
        position_embeddings=tables,
    )


def tiny(family: str, vocabulary: int = 20) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"gpt2": {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}}
    others = {
        "hidden_size": 8,
        "ffn_dim": 8,
        "word_embed_proj_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    }
    fields = sizes.get(family, others)
    config = AutoConfig.for_model(family, vocab_size=vocabulary, bos_token_id=0, **fields)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_table_is_what_the_model_adds_at_each_position(family: str) -> None:
    model = tiny(family).eval()
    table = position_embeddings(model)
    assert table.shape == (16, 8)
    seen: list[Tensor] = []
    layer = next(m for n, m in model.named_modules() if n.endswith(("h.0", "layers.0")))
    layer.register_forward_pre_hook(
        lambda _, args, named: seen.append([*args, *named.values()][0]), with_kwargs=True
    )
    ids = torch.full((1, 16), 7)
    model(ids)
    row = model.get_input_embeddings()(ids[0])
    torch.testing.assert_close(seen[0][0] - row, table)


def test_a_family_without_a_known_table_is_refused() -> None:
    model = tiny("gpt2")
    model.config.model_type = "other"
    with pytest.raises(UnsupportedModel, match="other"):
        position_embeddings(model)


def test_each_token_gets_the_row_of_its_position_on_either_side() -> None:
    tables = {side: torch.randn(9, 3) for side in ("source", "target")}
    features, source, target = torch.randn(4, 2), torch.tensor([1, 1, 3, 8]), torch.arange(2, 6)
    result = with_position_embeddings(features, tables, source, target)
    assert torch.equal(result[:, :2], features)
    assert torch.equal(result[:, 2:5], tables["source"][source])
    assert torch.equal(result[:, 5:], tables["target"][target])


def test_features_without_position_embeddings_are_not_copied() -> None:
    features = torch.randn(4, 2)
    assert with_position_embeddings(features, {}, torch.arange(4), torch.arange(4)) is features


def test_a_file_keeps_the_tables(placed: WMatrix, wmatrix: WMatrix, tmp_path: Path) -> None:
    placed.save(tmp_path / "a.wmatrix")
    result = load(tmp_path / "a.wmatrix")
    assert result.manifest.position_embeddings == ("source", "target")
    assert all(
        torch.equal(result.position_embeddings[side], table)
        for side, table in placed.position_embeddings.items()
    )
    assert result.manifest.embedding_width == wmatrix.manifest.embedding_width + 16 + 6


def test_a_file_without_a_table_of_its_manifest_is_corrupt(placed: WMatrix, tmp_path: Path) -> None:
    replace(placed, position_embeddings={"source": placed.position_embeddings["source"]}).save(
        tmp_path / "a.wmatrix"
    )
    with pytest.raises(WMatrixCorrupt, match="13, the shapes"):
        load(tmp_path / "a.wmatrix")


def test_a_memory_differs_by_its_position_embeddings(
    placed: WMatrix, wmatrix: WMatrix, package: Package, folder: Path
) -> None:
    """The map is linear: the same as without tables, plus their share of the latent, decoded."""
    plain = realign(package, wmatrix, folder, embed, dtype=torch.float32)
    result = realign(package, placed, folder, embed, dtype=torch.float32)
    sink = len(placed.manifest.sink)
    latents = placed.position_latents()["target"][sink : len(result.ids)]
    some = realign(
        package,
        replace(
            placed,
            position_embeddings={
                **placed.position_embeddings,
                "source": 0 * placed.position_embeddings["source"],
            },
        ),
        folder,
        embed,
        dtype=torch.float32,
    )
    last = placed.manifest.target.layers[-1]  # the layer that holds no positions
    width = last.heads * last.head_dim
    added = latents.float() @ placed.decode[:, -width:].float()
    actual = (some.values[-1] - plain.values[-1])[sink:].flatten(1)
    torch.testing.assert_close(actual, added, rtol=0, atol=2e-5)
    assert not torch.allclose(result.values[-1], some.values[-1])


def test_the_fused_operators_add_the_same(placed: WMatrix, package: Package, folder: Path) -> None:
    heads = {i: slice(0, 1) for i in range(len(placed.manifest.target.layers))}
    paged = PagedMap(placed, heads, DeviceWorkspace("cpu", 64))
    paged.chunk_rows = 3
    latent = latent_of(paged, package, folder, embed)
    plain = realign(package, placed, folder, embed, dtype=torch.float32)
    values = latent.rows.float() @ placed.decode.float() + placed.bias
    sink = len(placed.manifest.sink)
    torch.testing.assert_close(
        values[:, -4:], plain.values[-1][sink:].flatten(1), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("predecessors", [1, None])
def test_a_reader_adds_the_position_embeddings(
    predecessors: int | None,
    tiny_models: tuple[Path, Path],
    byte_level_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    model = tiny("gpt2", byte_level_tokenizer.get_vocab_size())
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    byte_level_tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader = Reader(tiny_models[0], tmp_path, predecessors)
    row = reader.read("the quick dogs")
    table = position_embeddings(reader.target_model)
    assert torch.equal(row.features[:, -8:], table[row.positions + len(reader.sink)])
    assert Reader(*tiny_models, predecessors).position_embeddings == {}
