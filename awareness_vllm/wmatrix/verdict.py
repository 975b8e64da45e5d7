"""The verdict whether a target can use a memory, and how: one for servers and checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from awareness_vllm.errors import (
    AwarenessError,
    ContextTooLong,
    NoWMatrix,
    RegistryError,
    UnsupportedRequest,
)
from awareness_vllm.models.geometry import Geometry
from awareness_vllm.packages.manifest import Manifest
from awareness_vllm.wmatrix.registry import Registry, WMatrixEntry


@dataclass(frozen=True)
class Verdict:
    """How a memory gets into a target's cache: as an exact copy, or realigned by the map `entry`.
    With a `refusal`, the error that a server answers, it does not."""

    exact: bool = False
    entry: WMatrixEntry | None = None
    refusal: AwarenessError | None = None

    def within(self, memory: str, tokens: int, limit: int) -> Verdict:
        """The verdict on a memory of so many target tokens in a context window of `limit`: refused
        where no room is left for a question and its answer."""
        try:
            check_fits(f"memory {memory}", tokens, 1, limit)
        except ContextTooLong as error:
            return replace(self, refusal=self.refusal or error)
        return self


def verdict(
    memory: str,
    source: Geometry,
    target: Geometry,
    registry: Registry,
    manifest: Manifest | None = None,
) -> Verdict:
    """The verdict on a memory of one model for another.

    Args:
        memory: its ID or name, for messages.
        manifest: the package's; without one (a listing) the package is taken to be whole and to
            have its text.

    Raises:
        RegistryError: whether there is a map cannot be known.
    """
    latent = manifest is not None and manifest.latent is not None
    exact, entry = source.same_model(target) and not latent, None
    try:
        if manifest is not None:
            check_text(memory, manifest)
        if not exact:
            check_positions(memory, source, target)
            entry = (
                registry.find(source, target, has_text=True)
                if manifest is None
                else registry.find_for(manifest, target)
            )
        if manifest is not None:
            layers = entry.manifest.layers if entry else range(len(source.layers))
            manifest.check_whole(layers)
    except RegistryError:
        raise
    except AwarenessError as error:
        return Verdict(exact, entry, error)
    return Verdict(exact, entry)


def check_text(memory: str, manifest: Manifest) -> None:
    """Raises UnsupportedRequest for a package without text, which no server loads."""
    if not manifest.has_text:
        raise UnsupportedRequest(
            f"memory {memory} has no text",
            found="a package captured without text",
            expected="one whose text the server can read itself, should a load fail",
            remedy="capture it with its text",
        )


def check_positions(memory: str, source: Geometry, target: Geometry) -> None:
    """Raises NoWMatrix for a memory of the target itself whose cache was another one."""
    if (source.weights, source.tokenizer) != (target.weights, target.tokenizer):
        return
    pairs = zip(source.layers, target.layers, strict=True)
    then, now = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
    if then != now:
        raise NoWMatrix(
            f"memory {memory} was captured on this model, but with other positions or windows",
            found=then,
            expected=now,
            remedy="capture it on this server (LongRoPE's factors depend on --max-model-len)",
        )


def check_fits(what: str, memory: int, prompt: int, limit: int) -> None:
    """Raises ContextTooLong where memory and prompt leave no token of the window to answer with."""
    if memory + prompt >= limit:
        raise ContextTooLong(
            f"{what} does not fit",
            found=f"{memory} tokens of memory and {prompt} of prompt",
            expected=f"fewer than {limit} (max_model_len)",
            remedy="use a shorter memory, or start the server with a larger --max-model-len",
        )
