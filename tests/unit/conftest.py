"""Tiny tokenizers and packages, made on the spot: unit tests use no models."""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from random_maps import random_map
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from awareness_vllm.anchors.corpus import Document
from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.packages.file import Package, build
from awareness_vllm.wmatrix.file import WMatrix

if TYPE_CHECKING:
    from latent_pairs import Pair
    from memories_server import Server
    from registry_server import RegistryServer
    from v2_model import Served
    from v2_stubs import Engine

    from awareness_vllm.oci.repository import Repository

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the other dogs look on.",
    "Ελληνικά και русский язык; עברית و العربية.",
    "日本語の文章と中文句子。 Über größere Straßen führt der Weg.",
    "naïve café, e\u0301tude, 👩‍👩‍👧 and 🏳️‍🌈 in one line\n\tand a second line.",
]


WORDS = tuple(TEXTS[0].strip(".").split())


def byte_level() -> Tokenizer:
    """Byte-level BPE, as GPT-2 and SmolLM2 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE over characters with bytes for what is not in the vocabulary, as Gemma has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        limit_alphabet=60,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS[:1] * 5 + TEXTS, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make unit` starts no registry, and needs none."""
    for item in items:
        if "registry" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of the tests' own: they neither read the user's nor leave anything there."""
    path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWARENESS_HOME", str(path))
        yield path


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, whose cache has nothing of the others'."""
    monkeypatch.setenv("AWARENESS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A real registry, without logins."""
    from registry_server import registry_server

    with registry_server(tmp_path_factory.mktemp("registry")) as server:
        yield server


@pytest.fixture(params=["layout", pytest.param("registry", marks=pytest.mark.slow)])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Repository:
    """A repository of the test's own: a folder, or one in a registry."""
    from awareness_vllm.oci.connect import open_repository

    if request.param == "layout":
        return open_repository(tmp_path / "layout")
    registry: RegistryServer = request.getfixturevalue("registry")
    return open_repository(registry.reference(f"test/{uuid.uuid4().hex}"))


@pytest.fixture(scope="session")
def byte_level_tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    return byte_fallback()


@pytest.fixture(scope="session")
def folder(byte_fallback_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target model's folder with nothing but its tokenizer."""
    path = tmp_path_factory.mktemp("target")
    byte_fallback_tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="session")
def geometry() -> Geometry:
    """Two layers that differ: one full, one with a window, another theta and other pairs."""
    return Geometry(
        name="tiny",
        model_type="llama",
        dtype="bfloat16",
        hidden_size=16,
        vocab_size=300,
        max_positions=64,
        layers=(
            LayerGeometry(
                heads=2,
                head_dim=4,
                positions=Positions(scheme="rope", theta=1e4, rotary_dim=4),
            ),
            LayerGeometry(
                heads=1,
                head_dim=8,
                positions=Positions(scheme="rope", theta=1e6, rotary_dim=8, interleaved=True),
                window=4,
            ),
        ),
        weights="w" * 64,
        tokenizer="t" * 64,
    )


@pytest.fixture(scope="session")
def make_package(geometry: Geometry) -> Callable[..., Package]:
    """A factory of packages: the same arguments give the same content."""

    def make(text: str = "hello wörld", seed: int = 0) -> Package:
        generator = torch.Generator().manual_seed(seed)
        raw = text.encode()
        count = len(raw)

        def states() -> list[torch.Tensor]:
            return [
                torch.randn(count, g.heads, g.head_dim, generator=generator).bfloat16()
                for g in geometry.layers
            ]

        ends = np.arange(1, count + 1, dtype=np.int64)
        return build(
            geometry=geometry,
            text=text,
            tokens=list(raw),
            spans=np.stack((ends - 1, ends), axis=1),
            keys=states(),
            values=states(),
            engine="transformers",
            versions={"torch": "0"},
        )

    return make


@pytest.fixture(scope="session")
def wmatrix(geometry: Geometry) -> WMatrix:
    """A random map from the tiny geometry to another: shapes matter here, not worth."""
    schemes = (
        Positions(scheme="rope", theta=1e4, rotary_dim=4),
        Positions(scheme="rope", theta=1e5, rotary_dim=4, interleaved=True),
        Positions(scheme="none"),
    )
    layers = tuple(LayerGeometry(heads=1, head_dim=4, positions=scheme) for scheme in schemes)
    target = geometry.model_copy(
        update={"name": "target", "hidden_size": 6, "layers": layers, "weights": "v" * 64}
    )
    return random_map(geometry, target, rank=5)


def save_model(folder: Path, tokenizer: Tokenizer, hidden: int, layers: int, heads: int) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=2,
    )
    torch.manual_seed(hidden)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Folder, tokenizer, hidden size, layers and heads to a random model."""
    return save_model


@pytest.fixture(scope="session")
def tiny_models(
    tmp_path_factory: pytest.TempPathFactory,
    byte_level_tokenizer: Tokenizer,
    byte_fallback_tokenizer: Tokenizer,
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return (
        save_model(root / "source", byte_level_tokenizer, hidden=16, layers=4, heads=2),
        save_model(root / "target", byte_fallback_tokenizer, hidden=24, layers=2, heads=3),
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_models: tuple[Path, Path]) -> Pair:
    """A package of the first tiny model, with its latents of a map to the second."""
    from latent_pairs import make_pair

    return make_pair(*tiny_models, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def anchors() -> list[Document]:
    generator = torch.Generator().manual_seed(0)

    def text() -> str:
        picks = torch.randint(len(WORDS), (320,), generator=generator)
        return " ".join(WORDS[i] for i in picks)

    return [Document(f"d{i}", text()) for i in range(10)]


@pytest.fixture(scope="session")
def fitted(tiny_models: tuple[Path, Path], anchors: list[Document]) -> WMatrix:
    """The map from the first tiny model to the second, without a certificate."""
    from awareness_vllm.fit import fit, gather  # late: it imports transformers

    config = fit.FitConfig(tokens=1000, rank=4, predecessors=0, calibration=0, held_out=0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "CHUNK_ROWS", 256)
        return fit.fit(*tiny_models, anchors, config, progress=False)


@pytest.fixture
def server(
    tmp_path: Path, tiny_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Server:
    """A server of two tenants, whose captures lie in a folder of the test's own."""
    from memories_server import server_of_tenants  # late: it imports vLLM

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return server_of_tenants(tmp_path, tiny_models[1])


@pytest.fixture(scope="session")
def windowed_model(
    byte_fallback_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small random model with a sliding window in every second layer."""
    from v2_model import save_gemma  # late: it imports vLLM

    return save_gemma(tmp_path_factory.mktemp("windowed"), byte_fallback_tokenizer)


@pytest.fixture
def serve(
    windowed_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Served]:
    """Options to that model as a server on CUDA would run it."""
    from v2_model import serve  # late: it imports vLLM

    def make(**options: object) -> Served:
        served = serve(windowed_model, tmp_path, **options)
        # Only now: vLLM refuses V2 without Triton where its configuration is made.
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        return served

    return make


@pytest.fixture(params=[False, True], ids=["in_step", "a_step_ahead"])
def overlapped(request: pytest.FixtureRequest) -> bool:
    """Whether vLLM schedules a step before it has the last one's output."""
    return bool(request.param)


@pytest.fixture
def engine(serve: Callable[..., Served], overlapped: bool) -> Engine:
    """An engine of one rank."""
    from v2_stubs import Engine  # late: it imports vLLM
    from v2_worker import Rank

    served = serve()
    return Engine(served, [Rank(served)], overlapped=overlapped)
