"""A passage's request to the engine: what it asks for, and what its output says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm import SamplingParams

from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.metrics import RECOMPUTED
from awareness_vllm.serving.params import kv_transfer_params
from awareness_vllm.serving.prompt import PassageRequest


def sampling_params(request: PassageRequest) -> SamplingParams:
    """A passage's request computes its states; of its answer, one token, nothing is used."""
    plan = kv_transfer_params(request.plan)
    return SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": plan})


def failure(kv_params: Mapping[str, Any] | None) -> str:
    """Why a passage's request has not computed it, by its output's `kv_transfer_params`."""
    report = (kv_params or {}).get(PARAMS_KEY) or {}
    return str(report["reason"]) if report.get("temperature") == RECOMPUTED else ""
