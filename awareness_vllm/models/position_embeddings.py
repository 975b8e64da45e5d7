"""Learned position embeddings of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from awareness_vllm.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES = {"gpt2": "wpe", "gpt_bigcode": "wpe", "opt": "decoder.embed_positions"}
"""The module that has the table, by family."""


@torch.no_grad()
def position_embeddings(model: PreTrainedModel) -> Tensor:
    """The table [P, E] float32 whose row p is added to the embedding of the token at position p.

    Raises:
        UnsupportedModel: an unknown family.
    """
    family = model.config.model_type
    if family not in TABLES:
        raise UnsupportedModel(
            "learned positions are not supported", found=family, expected=sorted(TABLES)
        )
    table = model.base_model.get_submodule(TABLES[family])
    # OPT's table begins with rows for padding.
    weight: Tensor = table.weight[getattr(table, "offset", 0) :]  # type: ignore[index]
    return weight.float().clone()
