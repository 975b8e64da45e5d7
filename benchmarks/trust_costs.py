"""What strict files, origins and signatures cost a cold load, beside another version of the code.

    git worktree add /tmp/before c145a3f
    python benchmarks/trust_costs.py --before /tmp/before --source DIR --target DIR --wmatrix FILE

Rounds of the two versions take turns, each in a process of its own: in one round a memory that
nothing has cached is resolved as by a server's front end, then read and aligned as by its worker.
Files are in the page cache. Then a signature of the same package is verified, beside reading it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOKENS = 2000
WARM_UP = 2
"""First rounds of a process, which import and page in."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="a checkout to compare with")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--wmatrix", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="at least 2,000 tokens (default: pydoc's topics)")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each version")
    parser.add_argument("--loads", type=int, default=4, help="loads in one turn, besides the first")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load_times(args)))
        return
    from awareness_vllm.provenance import hardware, versions

    with tempfile.TemporaryDirectory() as folder:
        args.store = Path(folder)
        path = prepare(args)
        times: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
        for _ in range(args.rounds):
            for name, root in (("before", args.before), ("now", Path(__file__).parents[1])):
                times[name] += turn(root, args)
        report = {
            "package": {"tokens": TOKENS, "bytes": path.stat().st_size},
            "cold load, ms": {name: summary(loads) for name, loads in times.items()},
            "ratio": round(median(times["now"], "all") / median(times["before"], "all"), 3),
            "signed": verification(path),
            "hardware": hardware(),
            "versions": versions(),
        }
    print(json.dumps(report, indent=2))


def prepare(args: argparse.Namespace) -> Path:
    """A package of TOKENS tokens of the source, as both versions read it."""
    from pydoc_data.topics import topics

    from awareness_vllm.models.tokens import load_tokenizer, tokenize
    from awareness_vllm.packages.capture import capture
    from awareness_vllm.packages.file import publish

    text = args.text.read_text() if args.text else "\n\n".join(topics.values())
    spans = tokenize(load_tokenizer(str(args.source)), text).spans
    return publish(capture(args.source, text.encode()[: spans[TOKENS - 1, 1]].decode()), args.store)


def turn(root: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """The times of some loads by the code in a checkout, in a new process."""
    paths = os.pathsep.join(str(root / name) for name in ("", "kernels"))
    argv = [sys.executable, __file__, "--child", "--before", args.store, "--loads", args.loads]
    argv += ["--source", args.source, "--target", args.target, "--wmatrix", args.wmatrix]
    done = subprocess.run(
        list(map(str, argv)),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def load_times(args: argparse.Namespace) -> list[dict[str, float]]:
    """Seconds of cold loads: resolved, then read and aligned."""
    import torch
    from transformers import AutoModelForCausalLM

    from awareness_vllm.serving.config import ServingConfig
    from awareness_vllm.serving.connector.loader import MemoryLoader
    from awareness_vllm.serving.request import MemoryRequest
    from awareness_vllm.serving.resolver import MemoryResolver
    from awareness_vllm.serving.served_model import ServedModel
    from awareness_vllm.wmatrix.file import load

    store = args.before  # of a child
    config = ServingConfig(store=str(store), wmatrices=(str(args.wmatrix),))
    model = ServedModel.read(args.target, 8192)
    (memory,) = (path.stem for path in store.glob("mem_*.safetensors"))
    weights = AutoModelForCausalLM.from_pretrained(args.target).get_input_embeddings()
    wmatrix, times = load(args.wmatrix), []
    for _ in range(WARM_UP + args.loads):
        # New caches each time: everything is cold but the files and the maps.
        resolver = MemoryResolver.from_config(config, model)
        loader = MemoryLoader.from_config(config, model, torch.bfloat16)
        started = time.perf_counter()
        prompt = resolver.resolve(MemoryRequest(ids=(memory,)), "")
        resolved = time.perf_counter()
        assert prompt.params is not None
        (part,) = prompt.params.parts
        loader.wmatrices[part.wmatrix] = wmatrix
        loader.embed = lambda ids: weights(ids).float()
        with torch.inference_mode():
            alignment = loader.request(part, "")
            read = time.perf_counter()
            while not alignment.result.done():
                if alignment.source.done():
                    read = read if alignment.work else time.perf_counter()
                    loader.advance()
                else:
                    time.sleep(0.0002)
        alignment.result.result()
        ended = time.perf_counter()
        times.append(
            {"resolve": resolved - started, "read": read - resolved, "all": ended - started}
        )
    return times[WARM_UP:]


def verification(path: Path) -> dict[str, float]:
    """Milliseconds of reading a package as a server's front end does, and of verifying a signature
    of it beside that."""
    from awareness_vllm.packages.file import read_index
    from awareness_vllm.trust.policy import TrustPolicy, signature_path
    from awareness_vllm.trust.signing import keygen, sign

    folder = path.parent
    pair = keygen(folder / "author")
    sign(path, read_index(path).digest, pair.private, signature_path(path, "package"))
    trust = folder / "trust.json"
    keys = {"author": {"public_key": str(pair.public), "roles": ["package"]}}
    trust.write_text(json.dumps({"keys": keys}))
    policy = TrustPolicy.read(trust)
    seconds: dict[str, list[float]] = {"read": [], "read and verify": []}
    for _ in range(20):
        started = time.perf_counter()
        digest = read_index(path).digest
        seconds["read"].append(time.perf_counter() - started)
        assert policy.signer(path, digest, "package") == "author"
        seconds["read and verify"].append(time.perf_counter() - started)
    return {name: round(1e3 * statistics.median(all_), 1) for name, all_ in seconds.items()}


def median(loads: list[dict[str, float]], part: str) -> float:
    return statistics.median(load[part] for load in loads)


def summary(loads: list[dict[str, float]]) -> dict[str, float]:
    return {part: round(1e3 * median(loads, part), 1) for part in loads[0]}


if __name__ == "__main__":
    main()
