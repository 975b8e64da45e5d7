"""vLLM's features together with memories, each tried on a server of its own.

    python benchmarks/features.py --model GEMMA3_FOLDER [--only NAME …]

With every feature a question is asked about a memory of the model itself; the greedy answer must
equal the one after reading the text on the same server, but for near-ties. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from awareness_demo.servers import AWARENESS, NAME, running
from safetensors.torch import save_file
from servers import ALIGNED, FLAGS

TEXT = (
    "The lighthouse at Cape Verity was built in 1871 by Anna Rask. Its lamp burned whale oil until "
    "1904, when the keeper, Jonas Feld, put in an electric arc. The tower is 43 metres high, with "
    "211 steps. In winter the keeper's family lived in the village, and he stayed on the rock."
) * 4
QUESTION = "\n\nIn short, the text says that the"
TOKENS = 32
NEAR_TIE = 0.15
"""Nats: a bfloat16 logit near 20 is rounded to steps of 0.125."""


@dataclass(frozen=True)
class Feature:
    """The flags of a server, and the fields of its requests."""

    name: str
    flags: tuple[str, ...] = ()
    body: dict[str, Any] = field(default_factory=dict)


SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
FEATURES = (
    Feature("as it is"),
    Feature("streaming", body={"stream": True}),
    Feature("`n` > 1", body={"n": 2, "temperature": 1, "top_k": 1}),
    Feature("logprobs", body={"logprobs": 5}),
    Feature("beam search", body={"use_beam_search": True}),
    Feature("`echo`", body={"echo": True}),
    Feature("`prompt_logprobs`", body={"prompt_logprobs": 1}),
    Feature("no prefix caching", ("--no-enable-prefix-caching",)),
    Feature("chunked prefill", ("--max-num-batched-tokens", "128", "--max-num-seqs", "8")),
    Feature("speculative decoding, n-gram", ("--speculative-config", json.dumps(SPECULATIVE))),
    Feature("fp8 KV cache", ("--kv-cache-dtype", "fp8")),
    Feature("tensor parallelism, 2 ranks", ("--tensor-parallel-size", "2")),
    Feature("LoRA enabled, base model", ("--enable-lora",)),
    Feature(
        "LoRA adapter", ("--enable-lora", "--lora-modules", "tuned=ADAPTER"), {"model": "tuned"}
    ),
)


def flags_of(folder: Path) -> list[object]:
    return ["--store", folder / "store", *FLAGS, *ALIGNED]


def capture_memory(model: Path, folder: Path) -> str:
    """The ID of the memory for all features, captured on a server of its own."""
    flags = [*flags_of(folder), "--allow-capture"]
    with running(AWARENESS, model, flags, folder / "log") as server:
        body = {"model": NAME, "max_tokens": 1}
        answer = ask(server.url, body, TEXT, memory={"capture": "text"}).raise_for_status()
        return answer.json()["memory"]["id"]


def try_feature(url: str, feature: Feature, memory: str) -> str:
    """The outcome of a memory with this feature, in a few words."""
    body = {
        "model": NAME,
        "temperature": 0,
        "max_tokens": TOKENS,
        "logprobs": 5,
        **feature.body,
    }
    ids = {"memory_ids": [memory]}
    native = ask(url, body, TEXT + QUESTION)
    gaps = []
    for _ in ("cold or warm", "hot"):
        answer = ask(url, body, QUESTION, **ids)
        if answer.status_code != 200:
            return f"refused, {answer.status_code}: {answer.json()['error']['message'][:60]}…"
        gaps.append(gap(native, answer))
    loads = ask(url, {**body, "stream": False}, QUESTION, **ids).json()["memory"]
    how = f"{loads['temperature']}, {loads['loaded_tokens']} tokens loaded the third time"
    if max(gaps) == 0:
        return f"works: says the same as after reading the text ({how})"
    if max(gaps) <= NEAR_TIE:
        return f"works: parts at a near-tie of {max(gaps):.2f} nats ({how})"
    return f"FAILS: parts by {max(gaps):.2f} nats ({how})"


def ask(url: str, body: dict[str, Any], prompt: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={**body, "prompt": prompt, **more}, timeout=300)


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    """Tokens and their distributions of each answer, streamed or not."""
    if response.headers["content-type"].startswith("application/json"):
        return [choice["logprobs"] for choice in response.json()["choices"]]
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [c["logprobs"] for line in lines for c in json.loads(line)["choices"] if c["logprobs"]]
    return [{name: [x for c in chunks for x in c[name]] for name in ("tokens", "top_logprobs")}]


def gap(native: httpx.Response, answer: httpx.Response) -> float:
    """Nats between the tokens at the first difference, in the native distribution; 0 if none."""
    gaps = [0.0]
    for right, other in zip(choices(native), choices(answer), strict=True):
        rows = zip(right["tokens"], other["tokens"], right["top_logprobs"], strict=True)
        first = next(((a, b, top) for a, b, top in rows if a != b), None)
        if first is not None:
            a, b, top = first
            gaps.append(top[a] - top.get(b, -float("inf")))
    return max(gaps)


def adapter(model: Path, folder: Path) -> Path:
    """A small random LoRA adapter for the model's queries."""
    config = json.loads((model / "config.json").read_text())
    width, rank = config["hidden_size"], 4
    target = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    path = folder / "adapter"
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({**target, "bias": "none"}))
    torch.manual_seed(0)
    sizes = {"A": (rank, width), "B": (width, rank)}
    save_file(
        {
            f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{part}.weight": torch.randn(n)
            for i in range(config["num_hidden_layers"])
            for part, n in sizes.items()
        },
        path / "adapter_model.safetensors",
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[f.name for f in FEATURES])
    args = parser.parse_args()
    chosen = [feature for feature in FEATURES if feature.name in args.only]
    print("| feature | memories |\n|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lora, memory = str(adapter(args.model, folder)), capture_memory(args.model, folder)
        for flags in dict.fromkeys(feature.flags for feature in chosen):
            own = [feature for feature in chosen if feature.flags == flags]
            more = [flag.replace("ADAPTER", lora) for flag in flags]
            try:
                with running(
                    AWARENESS, args.model, [*flags_of(folder), *more], folder / "log"
                ) as server:
                    for feature in own:
                        print(
                            f"| {feature.name} | {try_feature(server.url, feature, memory)} |",
                            flush=True,
                        )
            except RuntimeError:
                errors = [x for x in (folder / "log").read_text().splitlines() if "Error: " in x]
                for feature in own:
                    print(f"| {feature.name} | not started: {errors[0][-160:]} |", flush=True)


if __name__ == "__main__":
    main()
