"""References: `oci://host/repository[:tag|@digest]`, or a folder in OCI image layout."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from awareness_vllm.errors import BadInput, escaped
from awareness_vllm.files import home

SCHEME = "oci://"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
HOST = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?")
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
REPOSITORY = re.compile(rf"{COMPONENT}(?:/{COMPONENT})*")
ENVIRONMENT = "AWARENESS_REGISTRY"
KEY = "AWARENESS_REGISTRY_KEY"
"""Environment variable: the API key of the registry that `$AWARENESS_REGISTRY` names."""


@dataclass(frozen=True)
class Reference:
    """A repository and, with a `tag` or a `digest` ("sha256:…"), one of its artefacts.

    `host` is the registry's, with its port; None for a layout, whose folder is `repository`.
    """

    host: str | None
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str | Path) -> Reference:
        """A reference as users write it: a folder is one without `oci://`.

        Raises:
            BadInput: not a reference.
        """
        text = str(text)
        if not text.startswith(SCHEME):
            return cls._of_layout(text)
        if (reference := cls._of_registry(text.removeprefix(SCHEME))) is None:
            raise malformed(text)
        return reference

    @classmethod
    def _of_registry(cls, text: str) -> Reference | None:
        host, _, rest = text.partition("/")
        repository, tag, digest = _split(rest)
        fits = HOST.fullmatch(host) and REPOSITORY.fullmatch(repository) and len(repository) <= 255
        if not fits or (tag is not None and not TAG.fullmatch(tag)):
            return None
        return cls(host, repository, tag, digest)

    @classmethod
    def meant(cls, text: str) -> Reference | None:
        """The registry's reference that a text may be meant for: with another scheme or none, in
        capitals, or with a slash behind; None where it looks like a folder."""
        rest = text.split("://", 1)[-1].rstrip("/")
        host, _, path = rest.partition("/")
        repository, tag, digest = _split(path)
        looks = "://" in text or "." in host.strip(".") or ":" in host or host == "localhost"
        found = cls._of_registry(f"{host}/{repository.lower()}") if looks else None
        return found and replace(found, tag=tag, digest=digest)

    @classmethod
    def _of_layout(cls, text: str) -> Reference:
        if not text or "://" in text or "\0" in text:
            raise malformed(text)
        if Path(text).is_dir():  # also where its name has a colon
            return cls(None, text)
        folder, tag, digest = _split(text)
        if not folder or (tag is not None and not TAG.fullmatch(tag)):
            raise malformed(text)
        return cls(None, folder, tag, digest)

    @property
    def name(self) -> str | None:
        """The tag or the digest; None for a repository alone."""
        return self.digest or self.tag

    @property
    def repository_only(self) -> Reference:
        """The repository, without an artefact."""
        return replace(self, tag=None, digest=None)

    def at(self, name: str) -> Reference:
        """Another artefact of the repository, by its tag or digest. Raises BadInput."""
        if DIGEST.fullmatch(name):
            return replace(self, tag=None, digest=name)
        if not TAG.fullmatch(name):
            raise malformed(name)
        return replace(self, tag=name, digest=None)

    def __str__(self) -> str:
        where = self.repository if self.host is None else f"{SCHEME}{self.host}/{self.repository}"
        if self.digest is not None:
            return f"{where}@{self.digest}"
        return where if self.tag is None else f"{where}:{self.tag}"


def default_registry() -> str:
    """`$AWARENESS_REGISTRY`, by default the layout folder `$AWARENESS_HOME/registry`."""
    return os.environ.get(ENVIRONMENT) or str(home() / "registry")


def malformed(text: str) -> BadInput:
    """The error about what is no reference."""
    meant = Reference.meant(text)
    return BadInput(
        "not a reference to a registry",
        found=repr(escaped(text))[:200],
        expected="oci://HOST/REPOSITORY, or a layout folder, then perhaps :TAG or @sha256:DIGEST",
        remedy=None if meant is None else f"write {meant}",
    )


def _split(text: str) -> tuple[str, str | None, str | None]:
    """What stands before a tag or digest, the tag and the digest."""
    before, at, digest = text.rpartition("@")
    if at and DIGEST.fullmatch(digest):
        tagged, _, _ = _split(before)  # of a tag beside a digest the digest counts
        return tagged, None, digest
    before, colon, tag = text.rpartition(":")
    if colon and "/" not in tag:
        return before, tag, None
    return text, None, None
