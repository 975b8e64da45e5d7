"""The search index of a repository: which of its listings match, without asking for each again."""

from __future__ import annotations

import logging
import sqlite3
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from awareness_vllm.errors import CONTROL, ArtefactCorrupt, ArtefactNotFound, escaped
from awareness_vllm.files import listings_dir
from awareness_vllm.marketplace import database
from awareness_vllm.marketplace.database import Damaged
from awareness_vllm.marketplace.files import listing_of
from awareness_vllm.oci.artefact import MANIFEST, MAX_CONFIG, MAX_MANIFEST, Descriptor
from awareness_vllm.oci.repository import Repository
from awareness_vllm.oci.transfer import Found, parsed
from awareness_vllm.packages import listing as package_listing
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix import listing as wmatrix_listing
from awareness_vllm.wmatrix.listing import Listing, WMatrixListing

logger = logging.getLogger(__name__)
Kind = Literal["memory", "wmatrix"]
KINDS: dict[str, type[Listing]] = {"memory": PackageListing, "wmatrix": WMatrixListing}
TYPES = (package_listing.ARTEFACT, wmatrix_listing.ARTEFACT)
CONFIGS = (package_listing.CONFIG, wmatrix_listing.CONFIG)
BATCH = 256
"""Artefacts that are read at once, and are in the database before the next ones are."""
WORKERS = 8
STALE = 3600.0
"""Seconds after which a registry is asked again which manifest a tag names: BATCH tags a search."""
LIMIT = 20
TAKE_OVER = (
    "DELETE FROM tags WHERE NOT EXISTS "
    "(SELECT 1 FROM now WHERE now.tag = tags.tag AND now.digest = tags.digest)",
    "INSERT OR IGNORE INTO tags SELECT tag, digest, asked FROM now WHERE digest IS NOT NULL",
    "UPDATE tags SET asked = now.asked FROM now WHERE now.tag = tags.tag AND now.asked > 0",
    "DELETE FROM listings WHERE digest NOT IN (SELECT digest FROM tags)",
    "DELETE FROM damaged",
    "INSERT INTO damaged SELECT tag, damaged, size FROM now WHERE damaged IS NOT NULL",
)
"""What makes the tags that are `now` the ones that are known."""
SOURCES = """
    SELECT source_key FROM listings WHERE source = ? OR source_key = ?
    UNION SELECT target_key FROM listings WHERE target = ?
    UNION SELECT source_key FROM listings
        WHERE kind = 'wmatrix' AND readable AND (target = ? OR target_key = ?)
"""
"""The models whose memories a target can use: those of its name, and those that maps lead from."""


class New(NamedTuple):
    """A tag to read, its manifest's digest and size where the repository has said them, and the
    digest that the tag had when it was asked for last."""

    tag: str
    digest: str | None
    size: int | None
    known: str | None


@dataclass(frozen=True)
class Wanted:
    """What to search for.

    `text` are words that all occur, each perhaps only begun, in a listing's name, its tags (one is
    a memory's ID), models or description. `source` and `target` are names of models, whatever their
    case, or fingerprints of geometries. A memory's target is what can use it: its own model, one
    that a map here leads to, and, of memories of `sources` (fingerprints), this one; a latent's is
    the one that it was made for. `tokens` are the least and the most. `readable` are memories with
    their text, and maps that read it.
    """

    kind: Kind
    text: str | None = None
    source: str | None = None
    target: str | None = None
    sources: frozenset[str] = frozenset()
    tokens: tuple[int, int] | None = None
    readable: bool = False


class ListingIndex:
    """The listings of a repository, in a database under `$AWARENESS_HOME/cache/listings`.

    Config blobs never change: only those of new manifests are read. What has changed is known for
    nothing of a layout folder; a registry is asked for its tags in each search. What cannot be used
    is asked for again in each search: it may have been repaired in place.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        reference = repository.reference
        where = f"{reference.host or ''}/{reference.repository}"
        if reference.host is None:
            where = str(Path(reference.repository).resolve())
        self.path = database.path_of(listings_dir(), where)

    def search(self, wanted: Wanted, limit: int = LIMIT, refresh: bool = False) -> list[Listing]:
        """The listings that match, the best first where there is a text, else the newest.

        Args:
            refresh: whether a registry is asked which manifest each tag names now.

        Raises:
            RegistryError
        """
        query, values = sql_of(wanted)

        def action(connection: sqlite3.Connection) -> list[Listing]:
            if refresh:
                connection.execute("UPDATE tags SET asked = -1")
            return self._search(connection, query, (*values, limit))

        return database.rebuilding(self.path, action)

    def _search(
        self, connection: sqlite3.Connection, query: str, values: tuple[object, ...]
    ) -> list[Listing]:
        self._refresh(connection)
        try:
            rows = connection.execute(query, values).fetchall()
            return [
                KINDS[kind].model_validate_json(zlib.decompress(config)) for kind, config in rows
            ]
        except (zlib.error, ValidationError, KeyError) as error:
            raise Damaged(str(error)) from error

    def _refresh(self, connection: sqlite3.Connection) -> None:
        """Bring the database up to what the repository lists now."""
        version = self.repository.version()
        row = connection.execute("SELECT value FROM facts WHERE name = 'version'").fetchone()
        if version is not None and row == (version,):
            skipped = self._ask_again(connection)
        else:
            skipped = self._take_over(connection, version)
        if skipped:
            where = escaped(str(self.repository.reference))
            logger.warning("%d artefacts of %s cannot be used", skipped, where)

    def _ask_again(self, connection: sqlite3.Connection) -> int:
        """Read what could not be used when the repository last changed, BATCH of it; how many still
        cannot be."""
        rows = connection.execute(
            "SELECT min(tag), digest, size FROM damaged GROUP BY digest ORDER BY random() LIMIT ?",
            (BATCH,),
        )
        results = self._looks([New(tag, digest, size, None) for tag, digest, size in rows])
        for result in filter(None, results):
            digest, artefact = result
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute(
                "SELECT tag, digest FROM damaged WHERE digest = ?", (digest,)
            )
            # None where another process has done it, or taken over a later list.
            if (tags := known.fetchall()) and artefact is not None:
                database.insert(connection, digest, *artefact)
            connection.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?, 0)", tags)
            connection.execute("DELETE FROM damaged WHERE digest = ?", (digest,))
            connection.execute("COMMIT")
        return results.count(None)

    def _take_over(self, connection: sqlite3.Connection, version: str | None) -> int:
        """Have the database be what the repository lists; how much of that cannot be used."""
        self._list(connection)
        skipped = 0
        new = self._new(connection)
        for i in range(0, len(new), BATCH):
            skipped += self._read(connection, new[i : i + BATCH])
        connection.execute("BEGIN IMMEDIATE")
        for statement in TAKE_OVER:
            connection.execute(statement)
        if version is not None:
            connection.execute("INSERT OR REPLACE INTO facts VALUES ('version', ?)", (version,))
        connection.execute("COMMIT")
        return skipped

    def _list(self, connection: sqlite3.Connection) -> None:
        """List the tags, with the manifests that are known: from the repository, or from when it
        was asked last."""
        rows = (
            tagged
            for tagged in self.repository.tagged()
            if not tagged.tag.startswith("sha256-")  # lists of referrers, by the tag scheme
        )
        connection.execute("BEGIN")
        connection.execute("DELETE FROM now")
        connection.executemany(
            "INSERT OR REPLACE INTO now (tag, digest, size, type, asked) VALUES (?, ?, ?, ?, 0)",
            rows,
        )
        connection.execute(
            "UPDATE now SET digest = tags.digest FROM tags "
            "WHERE tags.tag = now.tag AND now.digest IS NULL AND tags.asked >= 0 "
            "AND now.tag NOT IN (SELECT tag FROM tags WHERE asked < ? ORDER BY asked LIMIT ?)",
            (time.time() - STALE, BATCH),
        )
        connection.execute("COMMIT")

    def _new(self, connection: sqlite3.Connection) -> list[New]:
        """The tags whose manifests are not in the database, or have to be asked for again."""
        rows = connection.execute(
            "SELECT tag, now.digest, size, tags.digest, min(id) "
            "FROM now LEFT JOIN tags USING (tag) "
            "WHERE now.digest IS NULL OR (now.digest IS NOT tags.digest "
            "AND (type IS NULL OR type IN (?, ?)) "
            "AND now.digest NOT IN (SELECT digest FROM listings)) "
            "GROUP BY ifnull(now.digest, tag) ORDER BY min(id)",
            TYPES,
        )
        return [New(*row[:4]) for row in rows]

    def _read(self, connection: sqlite3.Connection, batch: Sequence[New]) -> int:
        """Read listings into the database; how many of them cannot be used."""
        results = self._looks(batch)
        connection.execute("BEGIN IMMEDIATE")
        for new, result in zip(batch, results, strict=True):
            if result is None:  # asked for again next time
                connection.execute(
                    "UPDATE now SET damaged = digest, digest = NULL WHERE digest = ?", (new.digest,)
                )
                continue
            digest, artefact = result
            if artefact is not None:
                database.insert(connection, digest, *artefact)
            if new.digest is None:
                values = (digest, time.time(), new.tag)
                connection.execute("UPDATE now SET digest = ?, asked = ? WHERE tag = ?", values)
        connection.execute("COMMIT")
        return results.count(None)

    def _looks(self, batch: Sequence[New]) -> list[tuple[str, tuple[Listing, bytes] | None] | None]:
        """The result of `_look` for each."""
        if self.repository.reference.host is None:
            return list(map(self._look, batch))
        with ThreadPoolExecutor(WORKERS) as pool:  # each within this thread's deadline
            looks = [pool.submit(copy_context().run, self._look, new) for new in batch]
            return [look.result() for look in looks]

    def _look(self, new: New) -> tuple[str, tuple[Listing, bytes] | None] | None:
        """The digest of a tag's manifest, with its listing where that is new and ours; None where
        it cannot be used."""
        try:
            if new.digest is None or new.size is None:
                descriptor, raw = self.repository.manifest(new.tag)
            else:
                descriptor = Descriptor(media_type=MANIFEST, digest=new.digest, size=new.size)
                raw = self.repository.blob(descriptor, MAX_MANIFEST)
            manifest = parsed(descriptor, raw)
            if descriptor.digest == new.known or manifest.config.media_type not in CONFIGS:
                return descriptor.digest, None
            config = self.repository.blob(manifest.config, MAX_CONFIG)
            return descriptor.digest, (listing_of(Found(descriptor, manifest, config)), config)
        except (ArtefactCorrupt, ArtefactNotFound) as error:
            logger.debug("%s: %s", new.tag, error)
            return None


def sql_of(wanted: Wanted) -> tuple[str, list[object]]:
    """The statement that finds what is wanted, all but its limit, and its values."""
    tables, score, order = "listings", "0", "listings.id DESC"
    conditions: dict[str, tuple[object, ...]] = {"listings.kind = ?": (wanted.kind,)}
    if wanted.text is not None and (words := CONTROL.sub(" ", wanted.text).split()):
        tables = "texts JOIN listings ON listings.id = texts.rowid"
        # Quoted, a word is one word or several that follow each other, and never an operator.
        quoted = (f'"{word.replace(chr(34), chr(34) * 2)}" *' for word in words)
        conditions["texts MATCH ?"] = (" ".join(quoted),)
        score, order = "bm25(texts, 8, 4, 2, 1)", "place"
    if wanted.source is not None:
        conditions["(source = ? OR source_key = ?)"] = (wanted.source, wanted.source)
    if wanted.target is not None:
        leads, values = "(target = ? OR target_key = ?)", [wanted.target, wanted.target]
        if wanted.kind == "memory":
            marks = ", ".join("?" * len(wanted.sources))
            usable = f"source_key IN ({marks}) OR source_key IN ({SOURCES})"
            leads = f"({leads} OR (target IS NULL AND ({usable})))"
            values += [*wanted.sources, *[wanted.target] * SOURCES.count("?")]
        conditions[leads] = tuple(values)
    if wanted.tokens is not None:
        conditions["tokens BETWEEN ? AND ?"] = wanted.tokens
    if wanted.readable:
        conditions["readable"] = ()
    where = " AND ".join(conditions)
    # Config blobs are looked up of the best alone: sorting would carry all of them along.
    best = f"SELECT listings.id, {score} AS place FROM {tables} WHERE {where}"
    best += f" ORDER BY {order} LIMIT ?"
    query = f"SELECT kind, config FROM ({best}) JOIN configs USING (id) ORDER BY place, id DESC"
    return query, [value for values in conditions.values() for value in values]
