"""What is mutated: tiny packages and a W-Matrix between two models that are tokenizers alone."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor

from awareness_vllm.models.geometry import Geometry, LayerGeometry, Positions
from awareness_vllm.models.tokens import Tokens, load_tokenizer, prefix_ids, tokenize
from awareness_vllm.packages.file import AnyPackage, Package, build, with_payload, without_text
from awareness_vllm.packages.latent import LatentPackage, rounded
from awareness_vllm.packages.manifest import LATENT_FORMAT, StoredLatent
from awareness_vllm.wmatrix.file import WMatrix
from awareness_vllm.wmatrix.manifest import Anchors, WMatrixManifest

TEXT = "The lighthouse at Cape Verity was built in 1871 by Anna Rask: naïve café, 日本語, 👩‍👩‍👧."
PREDECESSORS, RANK = 2, 5


@dataclass(frozen=True)
class Seeds:
    """Two models' folders, packages by kind, and a map. `embedding` [V, E] is the target's."""

    target: Path
    geometry: Geometry
    prefix: tuple[int, ...]
    packages: dict[str, AnyPackage]
    wmatrix: WMatrix
    embedding: Tensor


def byte_level() -> Tokenizer:
    """Byte-level BPE without a prefix, as SmolLM2 has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """BPE with bytes for unknown characters and BOS before every text, as Gemma has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>"]
    trainer = trainers.BpeTrainer(
        vocab_size=150, limit_alphabet=40, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def geometry(name: str, vocabulary: int, layers: tuple[LayerGeometry, ...]) -> Geometry:
    return Geometry(
        name=name,
        model_type="llama",
        dtype="bfloat16",
        hidden_size=6,
        vocab_size=vocabulary,
        max_positions=4096,
        layers=layers,
        weights=digest(f"weights of {name}"),
        tokenizer=digest(f"tokenizer of {name}"),
    )


def captured(
    of: Geometry, text: str, tokens: Tokens, prefix: list[int], window: int | None = None
) -> Package:
    """A package of random states; with a `window`, layers that have one hold as many tokens."""
    generator = torch.Generator().manual_seed(len(text))
    count = len(prefix) + len(tokens.ids)

    def states() -> list[Tensor]:
        rows = [min(count, window) if window and g.window else count for g in of.layers]
        sizes = [(n, g.heads, g.head_dim) for n, g in zip(rows, of.layers, strict=True)]
        return [torch.randn(size, generator=generator).bfloat16() for size in sizes]

    return build(
        geometry=of,
        text=text,
        tokens=[*prefix, *tokens.ids],
        spans=np.concatenate((np.zeros((len(prefix), 2), np.int64), tokens.spans)),
        keys=states(),
        values=states(),
        engine="vllm" if window else "transformers",
        versions={"torch": "0"},
        name="a memory",
    )


def latent_of(package: Package, wmatrix: WMatrix, tokens: Tokens, int8: bool) -> LatentPackage:
    """A latent package of random rows, of the target's tokens of a package's text."""
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(len(tokens.ids), RANK, generator=generator)
    stored = rounded(rows) if int8 else {"latent": rows}
    latent = StoredLatent(
        package="mem_" + digest("package")[:32],
        wmatrix=wmatrix.tensors_digest,
        target=wmatrix.manifest.target,
        tokens=len(rows),
        rank=RANK,
        dtype="int8" if int8 else "float32",
    )
    manifest = package.manifest.model_copy(update={"format": LATENT_FORMAT, "latent": latent})
    made = LatentPackage(manifest, package.text, tokens.ids, tokens.spans, stored)
    return with_payload(made)


def random_wmatrix(source: Geometry, target: Geometry, sink: tuple[int, ...]) -> WMatrix:
    generator = torch.Generator().manual_seed(0)
    features = source.width + (1 + PREDECESSORS) * target.hidden_size

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    manifest = WMatrixManifest(
        source=source,
        target=target,
        layers=tuple(range(len(source.layers))),
        rank=RANK,
        predecessors=PREDECESSORS,
        sink=sink,
        anchors=Anchors(digest=digest("anchors"), documents=1, tokens=100),
        fit={"seed": 0},
        r2={"keys": 0.5, "values": 0.25},
        reconstruction_error=0.1,
        versions={"torch": "0"},
    )
    sinks = [[random(len(sink), g.heads, g.head_dim) for g in target.layers] for _ in range(2)]
    return WMatrix(
        manifest,
        mean=0.1 * random(features),
        scale=0.5 + random(features).abs(),
        encode=random(features, RANK),
        decode=random(RANK, target.width),
        bias=random(target.width),
        sink_keys=sinks[0],
        sink_values=sinks[1],
    )


def make_seeds(folder: Path) -> Seeds:
    """The seeds, with the models' tokenizers in a folder."""
    for name, tokenizer in (("source", byte_level()), ("target", byte_fallback())):
        (folder / name).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    from_, to = (load_tokenizer(str(folder / name)) for name in ("source", "target"))

    def rope(dim: int, theta: float = 1e4, interleaved: bool = False) -> Positions:
        return Positions(scheme="rope", theta=theta, rotary_dim=dim, interleaved=interleaved)

    def layer(heads: int, dim: int, positions: Positions, window: int | None = None):  # type: ignore[no-untyped-def]
        return LayerGeometry(heads=heads, head_dim=dim, positions=positions, window=window)

    source = geometry(
        "source",
        from_.get_vocab_size(),
        (layer(2, 4, rope(4)), layer(1, 8, rope(8, 1e6, True), window=4)),
    )
    none = Positions(scheme="none")
    target = geometry(
        "target",
        to.get_vocab_size(),
        (layer(1, 4, rope(4)), layer(1, 4, rope(4, 1e5, True), window=8), layer(1, 4, none)),
    )
    bos = prefix_ids(to)
    wmatrix = random_wmatrix(source, target, tuple(bos))
    mapped = captured(source, TEXT, tokenize(from_, TEXT), [])
    packages: dict[str, AnyPackage] = {
        "copied": captured(target, TEXT, tokenize(to, TEXT), bos),
        "mapped": mapped,
        "windowed": captured(source, TEXT[:40], tokenize(from_, TEXT[:40]), [], window=8),
    }
    packages["without text"] = without_text(mapped)
    for name, int8 in (("latent", False), ("latent in int8", True)):
        packages[name] = latent_of(mapped, wmatrix, tokenize(to, TEXT), int8)
    embedding = torch.randn(target.vocab_size, 6, generator=torch.Generator().manual_seed(3))
    return Seeds(folder / "target", target, tuple(bos), packages, wmatrix, embedding)
