"""Editions beside native reading: how often greedy answers of 64 tokens part, and at what gap.

    python benchmarks/exactness.py --texts 12 [any flag of vllm serve]

Both models, each with memories of the other, completions and chats by turns. Every answer is
compared with that to the same ids read natively at once; so is the answer after the same ids were
read natively in chunks of `--chunk` tokens, as an edition is made: what these differ by is
rounding, which an edition cannot escape. A gap is that of the two tokens at the first difference,
in nats, as native reading sees them. In float32 (`--dtype float32`) there is nothing to round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
from awareness_demo.servers import NAME
from awareness_demo.wmatrices import shipped
from servers import CHAT_TEMPLATE, FLAGS, demo, machine, serving, stop_on_terminate, stretches

LENGTHS = (300, 900)
"""Tokens of the texts, by turns; a window of Gemma-3 is 512."""
QUESTION = "\n\nIn short, the text says that the"
PATIENCE_S = 120.0
Answer = dict[str, Any]


class Client:
    """A client that asks for greedy answers and what was likely at each place of them."""

    def __init__(self, url: str) -> None:
        self.http, self.salts = httpx.Client(base_url=f"{url}/v1", timeout=300), 0

    def salt(self) -> str:
        self.salts += 1
        return f"salt-{self.salts}"

    def complete(self, prompt: str | list[int], **fields: Any) -> Answer:
        return self._ask("completions", logprobs=5, prompt=prompt, **fields)

    def chat(self, **fields: Any) -> Answer:
        messages = [{"role": "user", "content": QUESTION}]
        fields |= {
            "messages": messages,
            "chat_template": CHAT_TEMPLATE,
            "logprobs": True,
            "top_logprobs": 5,
        }
        return self._ask("chat/completions", **fields)

    def from_memory(self, memory: str, is_chat: bool) -> Answer:
        """The first answer from a memory's edition."""
        until = time.monotonic() + PATIENCE_S
        while True:
            fields = {"memory_ids": [memory]}
            answer = self.chat(**fields) if is_chat else self.complete(QUESTION, **fields)
            if all(answer["memory"]["edition"]):
                return answer
            if time.monotonic() > until:
                raise RuntimeError(f"no edition of {memory} after {PATIENCE_S:g} s")
            time.sleep(2)

    def in_chunks(self, ids: list[int], chunk: int) -> Answer:
        """The answer to ids that were read natively chunk by chunk."""
        salt = self.salt()
        for end in range(chunk, len(ids), chunk):
            self.complete(ids[:end], max_tokens=1, cache_salt=salt)
        return self.complete(ids, cache_salt=salt)

    def _ask(self, path: str, **fields: Any) -> Answer:
        body = {"model": NAME, "max_tokens": 64, "temperature": 0, "return_token_ids": True}
        return dict(self.http.post(path, json=body | fields).raise_for_status().json())


def prompt_ids(answer: Answer) -> list[int]:
    return list(answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"])


def likely(answer: Answer) -> list[tuple[str, dict[str, float]]]:
    """The token at each place of an answer, and the log probabilities of the likeliest there."""
    given = answer["choices"][0]["logprobs"]
    if "content" not in given:
        return list(zip(given["tokens"], given["top_logprobs"], strict=True))
    return [
        (one["token"], {t["token"]: t["logprob"] for t in one["top_logprobs"]})
        for one in given["content"]
    ]


def gap(native: Answer, other: Answer) -> float | None:
    """The gap where an answer parts from the native one; None where it does not."""
    for (right, top), (found, _) in zip(likely(native), likely(other), strict=True):
        if right != found:
            return top[right] - top.get(found, -float("inf"))
    return None


def measure(client: Client, memories: Sequence[str], chunk: int) -> dict[str, Any]:
    gaps: dict[str, list[float | None]] = {"edition": [], "native in chunks": []}
    for i, memory in enumerate(memories):
        answer = client.from_memory(memory, is_chat=i % 4 >= 2)
        ids = prompt_ids(answer)
        native = client.complete(ids, cache_salt=client.salt())
        gaps["edition"].append(gap(native, answer))
        gaps["native in chunks"].append(gap(native, client.in_chunks(ids, chunk)))
    return {
        name: {
            "same": sum(one is None for one in found),
            "of": len(found),
            "gaps": sorted(round(one, 4) for one in found if one is not None),
        }
        for name, found in gaps.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--texts", type=int, default=12, help="for each model")
    parser.add_argument("--chunk", type=int, default=128)
    args, flags = parser.parse_known_args()
    stop_on_terminate()
    models = demo()
    report: dict[str, Any] = {"texts": args.texts, "chunk": args.chunk, "flags": flags}
    for source, target in (models, models[::-1]):
        wmatrix = shipped(source, target)
        if wmatrix is None:
            raise SystemExit(f"no map is shipped from {source.name} to {target.name}")
        given = [*FLAGS, *flags, "--trust-request-chat-template"]
        lengths = [LENGTHS[i % len(LENGTHS)] for i in range(args.texts)]
        with serving(source, target, wmatrix, stretches(target, lengths), given) as (url, ids):
            report[target.name] = measure(Client(url), list(ids), args.chunk)
        print(target.name, report[target.name], file=sys.stderr)
    print(json.dumps(report | machine()))


if __name__ == "__main__":
    main()
