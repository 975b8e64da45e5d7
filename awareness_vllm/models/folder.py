"""The files of a model folder: where it is, its JSON documents, its weights' fingerprint.

Folders come from downloads that ended early, clones without git-lfs and editors that add marks, so
every file is checked before it is used, and an error names the file and what to do about it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from awareness_vllm.errors import UnsupportedModel
from awareness_vllm.files import file_digest, read_text_file

SAMPLE_BYTES = 4096
MAX_HEADER = 100_000_000
"""Bytes of the largest header that safetensors itself reads."""
LFS_POINTER = b"version https://git-lfs.github.com/"
BOM = b"\xef\xbb\xbf"
INDEX = "model.safetensors.index.json"
"""The file that says in which of several files (shards) each tensor is."""
CLOSED = ("gpt-3", "gpt-4", "gpt-5", "chatgpt", "claude", "gemini")
"""How names of models begin that are served through an API only."""


def is_model_folder(model: str | Path) -> bool:
    """Whether any text is the path of a model folder, and not a model's name."""
    try:
        return (Path(model).expanduser() / "config.json").is_file()
    except (OSError, RuntimeError, ValueError):  # too long, "~" of an unknown user, a NUL
        return False


def resolve_folder(model: str | Path) -> Path:
    """The local folder of a model, by path or by hub name; nothing is downloaded.

    Raises:
        UnsupportedModel: neither a model folder nor in the local hub cache.
    """
    if is_model_folder(model):
        return Path(model).expanduser().resolve()
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), local_files_only=True))
    except Exception as error:
        if str(model).casefold().startswith(CLOSED):
            raise closed_model(str(model)) from error
        raise UnsupportedModel(
            f"no model at {str(model)!r}",
            found=f"no config.json there, and not in the local hub cache ({type(error).__name__})",
            expected="a Hugging Face model folder",
            remedy="give a folder with config.json, safetensors and tokenizer.json",
        ) from error


def closed_model(name: str) -> UnsupportedModel:
    """The error about a model of which nobody outside can read weights or KV states."""
    return UnsupportedModel(
        f"{name} is a closed model: its weights and KV states cannot be had",
        found="a model that is served through an API only",
        expected="open models, as local Hugging Face folders",
        remedy="give the folders of open models; of closed ones MemoryCompatibilityChecker and "
        "`awareness check` show published figures (priors)",
    )


def unreadable(path: Path, found: object, expected: str) -> UnsupportedModel:
    """The error about a file of a model that is not what its name says; its first bytes tell what
    it is instead."""
    remedy = "download the model again; an interrupted download leaves files like this"
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        found, remedy = error, "check the folder: a file of the model is missing or not readable"
    else:
        if head == LFS_POINTER:
            found = "a git-lfs pointer, which stands for the file in a clone without git-lfs"
            remedy = f"run `git lfs pull` in {path.parent}"
        elif head.startswith(BOM):
            found, remedy = "a byte order mark", "save the file as UTF-8 without one"
        elif not head:
            found = "an empty file"
    return UnsupportedModel(f"cannot read {path}", found=found, expected=expected, remedy=remedy)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder, read as strictly as the engines read it: no byte order mark.

    Raises:
        UnsupportedModel: a file that is missing, or is not one JSON object in UTF-8.
    """
    try:
        document = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error, "a JSON object in UTF-8") from error
    if not isinstance(document, dict):
        raise unreadable(path, f"a JSON {type(document).__name__}", "a JSON object in UTF-8")
    return document


def chat_templates(folder: Path) -> str:
    """All chat templates of a model folder, one after the other; empty without any.

    Raises:
        UnsupportedModel: a tokenizer_config.json that cannot be read.
    """
    files = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    parts = [read_text_file(path) for path in files if path.is_file()]
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template") or []
            # One template, or several with names.
            parts += [template] if isinstance(template, str) else map(str, template)
    return "\n".join(parts)


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256, in hex, of a model folder's tokenizer.json.

    Raises:
        UnsupportedModel: no such file, or one that stands for it.
    """
    path, expected = folder / "tokenizer.json", "a fast tokenizer (tokenizer.json)"
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise unreadable(path, error, expected) from error
    if head in (b"", LFS_POINTER):
        raise unreadable(path, "no tokenizer", expected)
    return file_digest(path)


def weights_fingerprint(folder: Path) -> str:
    """sha256, in hex, of every safetensors header and a sample of each tensor of a model folder.

    A sample, because hashing a 70B model takes minutes; of each tensor, because a fine-tune may
    change few of them. It tells models apart; it does not defend against forgery.

    Raises:
        UnsupportedModel: no safetensors files, one that is not whole, or a missing shard.
    """
    files = sorted(folder.glob("*.safetensors"))
    _check_shards(folder)
    if not files:
        raise UnsupportedModel(f"no safetensors weights in {folder}", expected="*.safetensors")
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                _add_samples(digest, file, path.stat().st_size)
        except (OSError, ValueError, RecursionError) as error:
            raise unreadable(path, error, "a whole safetensors file") from error
    return digest.hexdigest()


def _check_shards(folder: Path) -> None:
    """Raises UnsupportedModel where the index names a file that is not there."""
    if not (folder / INDEX).is_file():
        return
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise unreadable(folder / INDEX, "no weight_map of file names", "the index of the weights")
    for name in sorted(set(shards.values())):
        if not (folder / name).is_file():
            raise unreadable(folder / name, "no such file", f"a shard that {INDEX} names")


def _add_samples(digest: Any, file: BinaryIO, size: int) -> None:
    """Add a file's header and a sample of each tensor to a digest.

    Raises:
        ValueError: not a safetensors file, or not whole.
    """
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 0 < length <= min(MAX_HEADER, size - 8):
        raise ValueError(f"no safetensors header in {size} bytes")
    header = json.loads(file.read(length).decode("utf-8"))
    if not isinstance(header, dict):
        raise ValueError("a safetensors header that is no JSON object")
    header.pop("__metadata__", None)
    end = 8 + length + max((_offsets(tensor)[1] for tensor in header.values()), default=0)
    if end != size:
        raise ValueError(f"{size} bytes, of {end} that its header states")
    digest.update(json.dumps(header, sort_keys=True).encode())
    for tensor in sorted(header):
        begin, end = _offsets(header[tensor])
        file.seek(8 + length + max(begin, (begin + end - SAMPLE_BYTES) // 2))
        digest.update(file.read(min(SAMPLE_BYTES, end - begin)))


def _offsets(tensor: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end. Raises ValueError."""
    match tensor:
        case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
            return begin, end
    raise ValueError(f"a tensor without usable offsets: {str(tensor)[:80]}")
