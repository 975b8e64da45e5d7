"""The base class of manifests, requests and configurations, and the type of their names."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from awareness_vllm.errors import CONTROL, BadInput

MAX_NAME = 200
"""Characters of a name."""


class FrozenModel(BaseModel):
    """A pydantic model that is immutable and refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _printable(text: str) -> str:
    if found := CONTROL.search(text):
        raise ValueError(f"control character {found[0]!a} at {found.start()}")
    return text


PlainText = Annotated[str, AfterValidator(_printable)]
"""A text of one line without control characters, whatever its length."""

PlainName = Annotated[str, Field(min_length=1, max_length=MAX_NAME), AfterValidator(_printable)]
"""A name that people read in listings: 1 to MAX_NAME characters, none of them a control character.
Line ends, tabs, terminal escapes and marks that turn the direction of writing count as such."""

_PLAIN_NAME: TypeAdapter[str] = TypeAdapter(PlainName)


def plain_name(name: str) -> str:
    """The name itself, where it is a PlainName.

    Raises:
        BadInput: anything else.
    """
    try:
        return _PLAIN_NAME.validate_python(name)
    except ValidationError as error:
        raise BadInput(
            "the name cannot be used",
            found=f"{ascii(name)[:80]} ({error.errors()[0]['msg']})",
            expected=f"1 to {MAX_NAME} characters without control characters and line ends",
        ) from error
