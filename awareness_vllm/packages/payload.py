"""The digest by which a file vouches for itself: its manifest and its tensors together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor


def payload_digest(document: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over a manifest's JSON document, its own `payload` left out, and named tensors.

    The document, not the model parsed from it: a field that a later version adds with a default
    must not change the digest of the files of today.

    Args:
        tensors: sorted by name.
    """
    fields = json.loads(document) | {"payload": ""}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
