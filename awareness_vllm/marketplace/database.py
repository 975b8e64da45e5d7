"""The database of a repository's listings: SQLite with its full-text search, derived from config
blobs that never change, and thrown away where it is damaged."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from awareness_vllm.errors import RegistryError
from awareness_vllm.packages.listing import PackageListing
from awareness_vllm.wmatrix.listing import Listing

T = TypeVar("T")
WAIT = 60.0
"""Seconds for which another process may write."""
SCHEMA = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID",
    "CREATE TABLE tags (tag TEXT PRIMARY KEY, digest TEXT, asked REAL) WITHOUT ROWID",
    "CREATE INDEX tags_digest ON tags (digest)",
    "CREATE TABLE damaged (tag TEXT PRIMARY KEY, digest TEXT, size INTEGER) WITHOUT ROWID",
    """CREATE TABLE listings (
        id INTEGER PRIMARY KEY, digest TEXT UNIQUE, kind TEXT, readable INTEGER, tokens INTEGER,
        source TEXT COLLATE NOCASE, source_key TEXT, target TEXT COLLATE NOCASE, target_key TEXT
    )""",
    "CREATE INDEX listings_source ON listings (source)",
    "CREATE INDEX listings_source_key ON listings (source_key)",
    "CREATE INDEX listings_target_key ON listings (target_key)",
    "CREATE TABLE configs (id INTEGER PRIMARY KEY, kind TEXT, config BLOB)",
    """CREATE VIRTUAL TABLE texts USING fts5 (
        name, tags, models, description,
        tokenize = "unicode61 remove_diacritics 2", prefix = '2 3'
    )""",
    """CREATE TRIGGER gone AFTER DELETE ON listings BEGIN
        DELETE FROM configs WHERE id = old.id;
        DELETE FROM texts WHERE rowid = old.id;
    END""",
    """CREATE TRIGGER tagged AFTER INSERT ON tags BEGIN
        UPDATE texts SET tags = (SELECT group_concat(tag, ' ') FROM tags WHERE digest = new.digest)
            WHERE rowid = (SELECT id FROM listings WHERE digest = new.digest);
    END""",
    """CREATE TRIGGER untagged AFTER DELETE ON tags BEGIN
        UPDATE texts SET tags = (SELECT group_concat(tag, ' ') FROM tags WHERE digest = old.digest)
            WHERE rowid = (SELECT id FROM listings WHERE digest = old.digest);
    END""",
)
NOW = """CREATE TEMP TABLE now (
    id INTEGER PRIMARY KEY, tag TEXT UNIQUE, digest TEXT, size INTEGER, type TEXT, asked REAL,
    damaged TEXT
)"""
"""What the repository lists now; `damaged` is the digest of what cannot be used."""
VERSION = zlib.crc32("".join(SCHEMA).encode()) >> 1
"""Of the schema, in the file: one that has another is made again."""


class Damaged(Exception):
    """A database that has to be made again."""


def path_of(folder: Path, repository: str) -> Path:
    """The file of a repository's database in the folder of them."""
    return folder / f"{hashlib.sha256(repository.encode()).hexdigest()[:32]}.sqlite"


@contextlib.contextmanager
def connected(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection. Raises Damaged, RegistryError: the file cannot be written."""
    connection: sqlite3.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            connection = _open(path)
        yield connection
    except (sqlite3.DatabaseError, OSError) as error:
        if _damaged(error):
            raise Damaged(str(error)) from error
        raise RegistryError(
            f"the search index {path.name} cannot be used",
            found=str(error),
            expected=f"a folder {path.parent} that can be written, with free space",
            remedy="free some space, or set AWARENESS_HOME to another folder",
        ) from error
    finally:
        if connection is not None:
            connection.close()


def _damaged(error: Exception) -> bool:
    """Whether an error is the file's, not the disk's or another process's."""
    if isinstance(error, sqlite3.OperationalError):
        # A statement that does not fit the tables: they are not ours.
        return error.sqlite_errorcode == sqlite3.SQLITE_ERROR
    return isinstance(error, sqlite3.DatabaseError)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process opens or removes a database in a folder: SQLite itself does not wait
    where two change a file's mode, and would use what it finds beside a file that was replaced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # where folders cannot be locked (NFS), without
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(path: Path) -> sqlite3.Connection:
    """A connection to a database of this version, in the place of what else there is."""
    try:
        return _connect(path)
    except sqlite3.DatabaseError as error:
        if not _damaged(error):
            raise
    remove(path)
    return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(NOW)
        if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
            connection.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA:  # which fails where another version's tables are there
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def rebuilding(path: Path, action: Callable[[sqlite3.Connection], T]) -> T:
    """The result of an action on a database, which is made anew where it turns out damaged.

    Raises:
        RegistryError
    """
    try:
        with connected(path) as connection:
            return action(connection)
    except Damaged:
        with _alone(path.parent):
            remove(path)
    try:
        with connected(path) as connection:
            return action(connection)
    except Damaged as error:
        raise RegistryError(
            f"the search index {path.name} is damaged", found=str(error), remedy=f"remove {path}"
        ) from error


def remove(path: Path) -> None:
    """Remove a database."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def insert(connection: sqlite3.Connection, digest: str, listing: Listing, config: bytes) -> None:
    """Insert the listing of the manifest of a digest, unless it is there."""
    if isinstance(listing, PackageListing):
        kind, tokens, readable = "memory", listing.token_count, listing.manifest.has_text
        latent = listing.manifest.latent
        ends = [listing.manifest.geometry, *([latent.target] if latent else [])]
    else:
        kind, tokens, readable = "wmatrix", None, listing.manifest.reads_tokens
        ends = [listing.manifest.source, listing.manifest.target]
    models = [value for end in ends for value in (end.name, end.fingerprint)]
    cursor = connection.execute(
        "INSERT OR IGNORE INTO listings VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?)",
        (digest, kind, readable, tokens, *models, *[None] * (4 - len(models))),
    )
    if cursor.rowcount:
        words = (listing.name, " ".join(end.name for end in ends), listing.description)
        connection.execute(
            "INSERT INTO texts (rowid, name, models, description) VALUES (?, ?, ?, ?)",
            (cursor.lastrowid, *words),
        )
        packed = zlib.compress(config, 1)
        connection.execute("INSERT INTO configs VALUES (?, ?, ?)", (cursor.lastrowid, kind, packed))
