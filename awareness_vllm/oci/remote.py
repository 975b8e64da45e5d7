"""A repository in a registry."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

import requests
from pydantic import BaseModel
from urllib3.exceptions import HTTPError, ReadTimeoutError

from awareness_vllm.errors import ArtefactCorrupt, ArtefactNotFound, RegistryError, escaped
from awareness_vllm.oci.adapter import Timeout
from awareness_vllm.oci.artefact import (
    INDEX,
    MANIFEST,
    MAX_INDEX,
    MAX_MANIFEST,
    Descriptor,
    ImageIndex,
    Layer,
    descriptor_of,
    parse_image_manifest,
)
from awareness_vllm.oci.download import CHUNK, Download, corrupt_blob, download
from awareness_vllm.oci.failures import failure_of
from awareness_vllm.oci.reference import DIGEST, Reference
from awareness_vllm.oci.repository import INTERNAL, Progress, Tagged, no_progress
from awareness_vllm.oci.session import ATTEMPTS, TIMEOUT, Session
from awareness_vllm.oci.upload import Upload
from awareness_vllm.tensor_file import FileRefused, parse_document

PAGE = 1000
"""Tags that are asked for at once."""
MAX_TAGS = 1_000_000
"""Tags of a repository; a page counts as LEAST at least."""
LEAST = 100
MAX_REFERRERS = 10_000
"""Referrers of one manifest that are listed; a page counts as LEAST at least."""
MOST_LOST = 64
"""Referrers that a pusher looks up at once: whoever may push can tag any number."""
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Remote:
    """A repository in a registry, by the OCI distribution specification. Threads may share it."""

    def __init__(
        self, reference: Reference, *, api_key: str | None = None, timeout: Timeout = TIMEOUT
    ) -> None:
        self.reference = reference
        self.session = Session(reference, api_key=api_key, timeout=timeout)
        self._lists_referrers = True

    def manifest(self, name: str) -> tuple[Descriptor, bytes]:
        response = self.session.request(
            "GET",
            f"manifests/{name}",
            headers={"Accept": f"{MANIFEST}, {INDEX}"},
            stream=True,
            expect=(200, 404),
        )
        if response.status_code == 404:
            response.close()
            raise self._not_found(name, "no such tag or digest")
        limit = MAX_INDEX if _type(response) == INDEX else MAX_MANIFEST
        raw = self._body(response, limit)
        if _type(response) not in (MANIFEST, INDEX):
            raise ArtefactCorrupt(
                f"{self.reference.at(name)} cannot be used",
                found=f"a document of type {escaped(_type(response))!r}"[:200],
                expected=MANIFEST,
                remedy="check that it is a memory or a W-Matrix",
            )
        descriptor = descriptor_of(raw, _type(response))
        claimed = name if DIGEST.fullmatch(name) else response.headers.get("Docker-Content-Digest")
        if claimed not in (None, descriptor.digest):
            raise corrupt_blob(descriptor.model_copy(update={"digest": claimed}), descriptor.digest)
        return descriptor, raw

    def blob(self, descriptor: Descriptor, limit: int) -> bytes:
        if descriptor.size > limit:
            raise corrupt_blob(descriptor, f"{descriptor.size} bytes", f"{limit} at most")
        response = self._get(descriptor, 0)
        content = self._body(response, descriptor.size)
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if (digest, len(content)) != (descriptor.digest, descriptor.size):
            raise corrupt_blob(descriptor, f"{len(content)} bytes with {digest}")
        return content

    def fetch(self, descriptor: Descriptor, draft: Path, progress: Progress = no_progress) -> None:
        with download(draft, descriptor, progress) as into:
            resumed = into.resumed
            self._receive(descriptor, into)
            if resumed and into.digest != descriptor.hex:
                into.restart()  # what was there already may have been at fault
                self._receive(descriptor, into)
            into.check()

    def _receive(self, descriptor: Descriptor, into: Download) -> None:
        """Write the rest of a blob, over as many connections as it takes: each must bring some."""
        idle = 0
        while into.done < descriptor.size:
            before = into.done
            response = self._get(descriptor, before)
            if response.status_code == 200 and before:
                into.restart()
            try:
                # What has come, not a whole chunk: of a slow registry, progress is heard, too.
                while chunk := response.raw.read1(CHUNK, decode_content=False):
                    into.write(chunk)
            except HTTPError as error:
                found = failure_of(error).found
                if isinstance(error, ReadTimeoutError):
                    idle = ATTEMPTS - 1  # a registry that is silent was waited for
            else:
                found = f"{into.done} bytes"
            finally:
                response.close()
            idle = 0 if into.done > before else idle + 1
            if idle == ATTEMPTS:
                raise RegistryError(
                    f"{self.reference} breaks off in {descriptor.digest}",
                    found=found,
                    expected=f"{descriptor.size} bytes",
                    remedy="pull again: it goes on where it stopped",
                )

    def _get(self, descriptor: Descriptor, begin: int) -> requests.Response:
        """A blob's bytes from `begin` on; status 200: all of them."""
        response = self.session.request(
            "GET",
            f"blobs/{descriptor.digest}",
            headers={"Range": f"bytes={begin}-"} if begin else {},
            stream=True,
            expect=(200, 206, 404),
        )
        if response.status_code == 404:
            response.close()
            raise self._not_found(descriptor.digest, "no such blob")
        length = response.headers.get("Content-Length", "")
        if response.status_code == 206:
            found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != begin:
                response.close()
                raise corrupt_blob(descriptor, "other bytes", f"those from {begin} on")
        else:
            begin = 0
        if length.isdecimal() and int(length) != descriptor.size - begin:
            response.close()
            raise corrupt_blob(descriptor, f"{length} bytes", f"{descriptor.size - begin}")
        return response

    def upload(self, layer: Layer, progress: Progress = no_progress) -> None:
        descriptor = layer.descriptor
        if self._has(descriptor):
            progress(descriptor.size)
            return
        begun = self.session.request("POST", "blobs/uploads/", expect=(202,))
        location = self.session.url(begun.headers.get("Location", ""))
        query = "&" if urlsplit(location).query else "?"
        self.session.request(
            "PUT",
            f"{location}{query}digest={quote(descriptor.digest, safe='')}",
            headers={"Content-Type": "application/octet-stream"},
            data=Upload(layer, progress),
            expect=(201,),
        )

    def _has(self, descriptor: Descriptor) -> bool:
        """Whether the registry has a blob. Whether the bytes are right only a pull could tell.

        Raises:
            ArtefactCorrupt: it has it in another size; what is sent again it would not keep.
        """
        path = f"blobs/{descriptor.digest}"
        response = self.session.request("HEAD", path, expect=(200, 404))
        if response.status_code == 404:
            return False
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) != descriptor.size:
            raise ArtefactCorrupt(
                f"{self.reference} has a damaged blob {descriptor.digest}",
                found=f"{length} bytes",
                expected=f"{descriptor.size} bytes",
                remedy="ask who runs it to delete that blob, and push again",
            )
        return True

    def put_manifest(self, raw: bytes, media_type: str, *tags: str) -> Descriptor:
        descriptor = descriptor_of(raw, media_type)
        for name in tags or (descriptor.digest,):
            response = self._put(raw, media_type, name)
        stored = response.headers.get("Docker-Content-Digest")
        if stored not in (None, descriptor.digest):
            raise RegistryError(
                f"{self.reference} has changed a manifest", found=stored, expected=descriptor.digest
            )
        subject = None if media_type == INDEX else parse_image_manifest(raw).subject
        if subject is not None and "OCI-Subject" not in response.headers:
            own = referrer_tag(subject.digest, descriptor)
            self._put(raw, media_type, own)
            self._refer(subject.digest, own)
        return descriptor

    def _put(self, raw: bytes, media_type: str, name: str) -> requests.Response:
        headers = {"Content-Type": media_type}
        return self.session.request(
            "PUT", f"manifests/{name}", headers=headers, data=raw, expect=(201,)
        )

    def _refer(self, subject: str, own: str) -> None:
        """Have all referrers with a tag of their own, first of all that of `own`, in the tagged
        index of their subject's, which a registry without the API has clients keep.

        Two that write at once overwrite each other's index, and no request of the protocol prevents
        that. But nobody overwrites a tag that is one referrer's alone. Whoever writes the index
        last looks at these tags afterwards: so none that was there by then is missing.
        """
        for _ in range(3 * ATTEMPTS):
            index = self._tagged_referrers(subject)
            known = {referrer_tag(subject, entry) for entry in index.manifests}
            tags = {own, *self._all_tags(f"{referrers_tag(subject)}.")} - known
            some = sorted(tags, key=lambda tag: (tag != own, random.random()))[:MOST_LOST]
            lost = [entry for tag in some if (entry := self._referrer(subject, tag)) is not None]
            if not lost:
                return
            whole = index.model_copy(update={"manifests": [*index.manifests, *lost]})
            document = whole.model_dump_json(by_alias=True, exclude_none=True).encode()
            self._put(document, INDEX, referrers_tag(subject))
            time.sleep(random.uniform(0, 0.1))
        raise RegistryError(
            f"{self.reference} does not keep who refers to {subject}",
            found="an index that others overwrite",
            remedy="push again",
        )

    def _referrer(self, subject: str, tag: str) -> Descriptor | None:
        """The entry of a referrer by its own tag; None for what is not one of this subject."""
        try:
            descriptor, raw = self.manifest(tag)
            manifest = parse_image_manifest(raw)
        except (ArtefactNotFound, ArtefactCorrupt, FileRefused):
            return None
        refers = manifest.subject is not None and manifest.subject.digest == subject
        if not refers or referrer_tag(subject, descriptor) != tag:
            return None
        update = {"artifact_type": manifest.artifact_type, "annotations": manifest.annotations}
        return descriptor.model_copy(update=update)

    def tags(self, prefix: str = "", *, internal: bool = False) -> Iterator[str]:
        return (t for t in self._all_tags(prefix) if bool(INTERNAL.fullmatch(t)) == internal)

    def _all_tags(self, prefix: str) -> Iterator[str]:
        # Tags come in the order of the alphabet; a registry that cannot begin in the middle
        # (Distribution 2.8) gives all of them.
        path = f"tags/list?n={PAGE}" + (f"&last={quote(prefix)}" if prefix else "")
        seen = 0
        while seen < MAX_TAGS:
            response = self.session.request("GET", path, expect=(200, 404))
            if response.status_code == 404:
                return  # nobody has pushed anything yet
            tags = self._tags(response)
            seen += max(len(tags), LEAST)
            yield from (tag for tag in tags if tag.startswith(prefix))
            link = response.links.get("next", {}).get("url")
            if not link or (tags and tags[-1] > prefix and not tags[-1].startswith(prefix)):
                return
            path = urljoin(self.session.url(path), link)
        raise self._unreadable(b"a list without end", f"{MAX_TAGS} tags at most")

    def tagged(self) -> Iterator[Tagged]:
        return map(Tagged, self.tags())

    def version(self) -> str | None:
        return None

    def _tags(self, response: requests.Response) -> list[str]:
        try:
            return _TagList.model_validate_json(response.content).tags or []
        except ValueError as error:
            raise self._unreadable(response.content, "a list of tags in JSON") from error

    def referrers(self, digest: str, artifact_type: str | None = None) -> list[Descriptor]:
        """As of a `Repository`: by the referrers API, or else by the index under the tag that the
        specification has registries without the API keep."""
        found = self._listed_referrers(digest, artifact_type) if self._lists_referrers else None
        if found is None:
            # A registry with the API answers so for no digest.
            self._lists_referrers = False
            found = self._tagged_referrers(digest).manifests[-MAX_REFERRERS:]
        # A registry need not know the filter.
        return [d for d in found if artifact_type in (None, d.artifact_type)]

    def _listed_referrers(self, digest: str, artifact_type: str | None) -> list[Descriptor] | None:
        """The referrers by the API, page by page; None without the API."""
        query = f"?artifactType={quote(artifact_type, safe='')}" if artifact_type else ""
        path, seen = f"referrers/{digest}{query}", 0
        found: list[Descriptor] = []
        while seen < MAX_REFERRERS:
            response = self.session.request("GET", path, expect=(200, 404, 405))
            if response.status_code != 200:
                return found or None
            page = self._index(response.content).manifests
            found += page
            seen += max(len(page), LEAST)
            if not (link := response.links.get("next", {}).get("url")):
                break
            path = urljoin(self.session.url(path), link)
        return found[:MAX_REFERRERS]

    def _tagged_referrers(self, digest: str) -> ImageIndex:
        """The tagged index of referrers. What a client has put there that is none is as good as
        none: whoever pushes the next referrer writes another."""
        try:
            descriptor, raw = self.manifest(referrers_tag(digest))
            return self._index(raw) if descriptor.media_type == INDEX else ImageIndex()
        except (ArtefactNotFound, ArtefactCorrupt):
            return ImageIndex()

    def _index(self, raw: bytes) -> ImageIndex:
        try:
            return parse_document(ImageIndex, raw, "image index")
        except FileRefused as error:
            raise self._unreadable(raw, "an image index", ArtefactCorrupt) from error

    def _body(self, response: requests.Response, limit: int) -> bytes:
        """A small body as a whole. Raises RegistryError."""
        try:
            content = response.raw.read(limit + 1, decode_content=False)
        except HTTPError as error:
            raise self._unreadable(failure_of(error).found, "a whole answer") from error
        finally:
            response.close()
        if len(content) > limit:
            raise self._unreadable(content, f"{limit} bytes at most", ArtefactCorrupt)
        return bytes(content)

    def _unreadable(
        self, found: bytes | str, expected: str, kind: type[RegistryError] = RegistryError
    ) -> RegistryError:
        return kind(
            f"{self.reference} answers what it should not",
            found=found if isinstance(found, str) else repr(found[:80]),
            expected=expected,
            remedy="check that it is an OCI registry",
        )

    def _not_found(self, name: str, found: str) -> ArtefactNotFound:
        return ArtefactNotFound(
            f"{self.reference} has no {name}",
            found=found,
            expected="one that `awareness search` shows",
        )


class _TagList(BaseModel):
    """The answer to `tags/list`."""

    tags: list[str] | None


def referrers_tag(digest: str) -> str:
    """The tag of the index of a manifest's referrers."""
    return digest.replace(":", "-", 1)


def referrer_tag(subject: str, referrer: Descriptor) -> str:
    """The tag that is one referrer's alone."""
    return f"{referrers_tag(subject)}.{referrer.hex[:16]}"


def _type(response: requests.Response) -> str:
    """The media type of a response."""
    return response.headers.get("Content-Type", "").split(";")[0].strip().lower()
