"""The place of a memory in a chat: in the first user turn, or before the whole template.

    awareness serve SMOLLM2_FOLDER --port 8000 --allow-capture …
    python benchmarks/placement.py --url http://127.0.0.1:8000 --cases CASES.jsonl --limit 60

Each case's context is captured on the running server itself, then its question is asked in a chat:
with the memory in the turn (as the server places it), with the memory before the rendered template,
with the text natively at both places, and with neither. A reply counts where it contains the
answer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from awareness_vllm.evaluate.bootstrap import mean
from awareness_vllm.evaluate.evaluate import sample_evenly

MAX_TOKENS = 24


class Chat:
    """A client of the served model, with greedy decoding."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, timeout=300)
        self.model = self.client.get("/v1/models").json()["data"][0]["id"]

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(
            path, json={"model": self.model, "temperature": 0, "max_tokens": MAX_TOKENS, **body}
        )
        answer.raise_for_status()
        return answer.json()

    def capture(self, text: str) -> str:
        return self.post("/v1/completions", prompt=text, memory={"capture": "case"})["memory"]["id"]

    def ask(self, question: str, **body: Any) -> str:
        messages = [{"role": "user", "content": question}]
        answer = self.post("/v1/chat/completions", messages=messages, **body)
        return answer["choices"][0]["message"]["content"]

    def complete(self, prompt: str | list[int], **body: Any) -> str:
        return self.post("/v1/completions", prompt=prompt, **body)["choices"][0]["text"]

    def render(self, question: str) -> list[int]:
        """The ids of a chat with this question, rendered by the template."""
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages}
        return self.client.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    def ids(self, text: str) -> list[int]:
        body = {"model": self.model, "prompt": text}
        return self.client.post("/tokenize", json=body).raise_for_status().json()["tokens"]


def conditions(chat: Chat, context: str, question: str) -> dict[str, Callable[[], str]]:
    """Functions that get the replies to compare, by condition."""
    memory = [chat.capture(context)]
    return {
        "memory in the turn": lambda: chat.ask(question, memory_ids=memory),
        "memory before the template": lambda: chat.complete(
            chat.render(question), memory_ids=memory, add_special_tokens=False
        ),
        "text in the turn": lambda: chat.ask(f"{context}\n\n{question}"),
        "text before the template": lambda: chat.complete(
            chat.ids(context) + chat.render(question), add_special_tokens=False
        ),
        "neither": lambda: chat.ask(question),
    }


def question_of(case: dict[str, str]) -> str:
    """The question alone: a chat model begins its answer itself."""
    return case["question"].split("Question:")[-1].split("Answer:")[0].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60)
    args = parser.parse_args()
    chat = Chat(args.url)
    cases = sample_evenly([json.loads(line) for line in args.cases.open()], args.limit)
    hits_by_condition: dict[str, list[float]] = {}
    for case in tqdm(cases):
        for condition, reply in conditions(chat, case["context"], question_of(case)).items():
            hits_by_condition.setdefault(condition, []).append(
                float(case["answer"].strip() in reply())
            )
    hits = {condition: np.array(values) for condition, values in hits_by_condition.items()}
    report = {
        "model": chat.model,
        "n": len(cases),
        "answered": {condition: mean(values) for condition, values in hits.items()},
        "in the turn less before the template": {
            what: mean(hits[f"{what} in the turn"] - hits[f"{what} before the template"])
            for what in ("memory", "text")
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
