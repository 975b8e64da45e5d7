"""A response's report on its memories: in headers, and in the body where it is whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from starlette.responses import Response

from awareness_vllm.serving.config import PARAMS_KEY
from awareness_vllm.serving.connector.metrics import RECOMPUTED
from awareness_vllm.serving.http import is_whole_answer, replace_body, set_headers
from awareness_vllm.serving.prompt import Prompt
from awareness_vllm.serving.request import MEMORY


def add_report(
    response: Response, prompt: Prompt, lost: Callable[[Prompt], None] = lambda prompt: None
) -> dict[str, Any]:
    """Report on a response's memories: in its headers and, unless it is a stream, in its body, with
    the engine's own report on the load (temperature, tokens, seconds). A prompt whose load failed
    is `lost`.

    Returns:
        the report.
    """
    report = prompt.report()
    if is_whole_answer(response):
        body = json.loads(bytes(response.body))
        params = body.get("kv_transfer_params") or {}
        report |= params.pop(PARAMS_KEY, {})
        if report.get("temperature") == RECOMPUTED and not report.get("cached_tokens"):
            lost(prompt)
            natively = prompt.recomputed()
            report |= {**natively.promised(), "edition": natively.report()["edition"]}
            report.pop("reread", None)
        body[MEMORY] = report
        if "kv_transfer_params" in body:
            body["kv_transfer_params"] = params or None
        replace_body(response, body)
    set_headers(response, headers_of(report))
    return report


def headers_of(report: dict[str, Any]) -> dict[str, str]:
    """A report's headers by the end of their names; an unknown retention has none."""
    headers = {
        "Memories": ",".join(report["ids"]),
        "Plan": report["plan"],
        "Tokens": str(report["tokens"]),
    }
    if "reason" in report:
        headers["Reason"] = report["reason"]
    if "reread" in report:
        headers["Reread"] = str(report["reread"]["tokens"])
    if "quoted" in report:
        headers["Quoted"] = str(report["quoted"]["tokens"])
    if None not in report["retention"]:
        headers["Retention"] = f"{min(report['retention']):.3f}"
        headers["Basis"] = ",".join(sorted(set(report["basis"])))
    return headers
