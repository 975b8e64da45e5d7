"""Latent packages from packages: the first half of a realignment, done before it is needed."""

from __future__ import annotations

from pathlib import Path

import torch

from awareness_vllm.align.realign import BLOCK, Features, sources
from awareness_vllm.errors import UnsupportedModel, UnsupportedRequest
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.tokens import load_tokenizer, tokenize
from awareness_vllm.packages.file import AnyPackage, Package, with_payload, with_states
from awareness_vllm.packages.latent import LatentPackage, rounded
from awareness_vllm.packages.manifest import LATENT_FORMAT, StoredLatent, check_id
from awareness_vllm.provenance import versions
from awareness_vllm.wmatrix.features import Embed
from awareness_vllm.wmatrix.file import WMatrix


@torch.inference_mode()
def to_latent(
    package: AnyPackage,
    wmatrix: WMatrix,
    target: str | Path,
    embed: Embed,
    *,
    package_id: str,
    int8: bool = False,
) -> LatentPackage:
    """The latent package of a package, for the target of one map. It is aligned as the package is:
    the latent is encoded in the same blocks, and stored as it is unless it is rounded to `int8`.

    Args:
        target: the target's folder, for its tokenizer.
        embed: the target's own embedding; to be the one of a server, in its dtype.
        package_id: the package's ID.

    Raises:
        InvalidMemoryId
        UnsupportedRequest: a latent already, states lost to a window, no text, a residual map.
        UnsupportedModel: a map from another model, or a folder of another target.
        PackageCorrupt: states that no model computes.
    """
    whole, manifest = with_states(package), wmatrix.manifest
    check_exportable(whole, wmatrix)
    if not geometry_of(target).same_model(manifest.target):
        raise UnsupportedModel(
            "the folder is not of the map's target",
            found=geometry_of(target).identity,
            expected=manifest.target.identity,
        )
    ids, source = sources(whole, manifest, target)
    features = Features(whole, wmatrix, ids, source, embed)
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, len(source), BLOCK)]
    rows = torch.cat([wmatrix.latent(*features.block(block)) for block in blocks])
    stored = rounded(rows) if int8 else {"latent": rows}
    latent = StoredLatent.model_validate(
        {
            "package": check_id(package_id),
            "wmatrix": wmatrix.tensors_digest,
            "target": manifest.target,
            "tokens": len(rows),
            "rank": manifest.rank,
            "dtype": str(stored["latent"].dtype).removeprefix("torch."),
        }
    )
    kept = whole.manifest.model_copy(
        update={"format": LATENT_FORMAT, "latent": latent, "versions": versions(), "payload": ""}
    )
    tokens = tokenize(load_tokenizer(str(target)), whole.text)
    return with_payload(LatentPackage(kept, whole.text, tokens.ids, tokens.spans, stored))


def check_exportable(package: Package, wmatrix: WMatrix) -> None:
    """Check that a map's latent is all that the map's target needs of a package.

    Raises:
        UnsupportedRequest, UnsupportedModel
    """
    manifest, source = wmatrix.manifest, package.geometry
    if source.same_model(manifest.target):
        raise UnsupportedRequest(
            "the map's target copies this memory exactly: a latent would only lose of it",
            found=f"a memory of {source.name}",
            expected=f"one of {manifest.source.name}",
            remedy="use the package as it is",
        )
    if not source.same_model(manifest.source):
        raise UnsupportedModel(
            "the map leads from another model than the package's",
            found=source.identity,
            expected=manifest.source.identity,
            remedy="give a map from the model that made the package",
        )
    if manifest.residual:
        raise UnsupportedRequest(
            "a residual map has no latent that stands alone",
            found="a map whose outputs are added to the source's states",
            expected="a map that gives the target's states themselves",
            remedy="use the package as it is",
        )
    if not (package.manifest.has_text and manifest.reads_tokens):
        raise UnsupportedRequest(
            "a latent package has its text, which its target reads where a load fails",
            found="a package, or a map, without text",
            expected="a package with its text, and a map that reads tokens",
            remedy="capture with the text, and fit without `--without-text`",
        )
