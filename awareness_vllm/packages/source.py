"""Text files that become memories."""

from __future__ import annotations

from pathlib import Path

from awareness_vllm.errors import BadInput


def read_text_file(path: Path) -> str:
    """A file's text, line ends as they are.

    Raises:
        BadInput: missing, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"cannot read {path}", found=str(error), expected="a UTF-8 text file"
        ) from error
