"""Capture with transformers: the KV states of a text on the source model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from awareness_vllm.errors import BadInput
from awareness_vllm.models.describe import geometry_of
from awareness_vllm.models.folder import resolve_folder
from awareness_vllm.models.hf import load_model, states
from awareness_vllm.models.tokens import Tokens, load_tokenizer, prefix_ids, tokenize
from awareness_vllm.packages.file import Package, build
from awareness_vllm.provenance import versions
from awareness_vllm.schema import plain_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_tokens(folder: str | Path, text: str) -> Tokens:
    """Tokens of a text as a model reads it: the tokenizer's own prefix (BOS), then the text's.

    Raises:
        BadInput: an empty text, or more tokens than the model has positions.
    """
    path = resolve_folder(folder)
    tokens = tokens_of(path, text)
    limit = geometry_of(path).max_positions
    if len(tokens.ids) > limit:
        raise BadInput(
            f"the text does not fit into {path.name}",
            found=f"{len(tokens.ids)} tokens",
            expected=f"at most {limit}",
            remedy="split the text into several memories",
        )
    return tokens


def tokens_of(path: Path, text: str) -> Tokens:
    """Tokens of a text as the model in a folder reads it, however many.

    Raises:
        BadInput: an empty text.
    """
    tokenizer = load_tokenizer(str(path))
    prefix = prefix_ids(tokenizer)
    body = tokenize(tokenizer, text)
    if not body.ids:
        raise BadInput("nothing to capture", found="an empty text", expected="at least one token")
    spans = np.concatenate((np.zeros((len(prefix), 2), np.int64), body.spans))
    return Tokens(prefix + body.ids, spans)


def capture(
    folder: str | Path, text: str, *, name: str | None = None, model: PreTrainedModel | None = None
) -> Package:
    """The package of a text: states computed in float32, stored in the model's dtype.

    Raises:
        BadInput: as `read_tokens` says, and for a name that is not a PlainName.
    """
    if name is not None:
        plain_name(name)
    tokens = read_tokens(folder, text)
    geometry = geometry_of(folder, len(tokens.ids))
    keys, values = states(model or load_model(folder), tokens.ids)
    dtype = getattr(torch, geometry.dtype)
    return build(
        geometry=geometry,
        text=text,
        tokens=tokens.ids,
        spans=tokens.spans,
        keys=[key.to(dtype) for key in keys],
        values=[value.to(dtype) for value in values],
        engine="transformers",
        versions=versions(),
        name=name,
    )
