"""SqliteStore: the store of one machine, in a database file that its processes share, or in memory within one of them.

In memory it is the default: nothing to install, and nothing outlives the process.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from dynamollm.store import BEGINNING, NEVER, Document, Stamp

T = TypeVar("T")

FILE = "dynamollm.sqlite"
BUSY_TIMEOUT_S = 1.0
SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (name TEXT PRIMARY KEY, body BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS published (name TEXT PRIMARY KEY, epoch INTEGER, version INTEGER, body BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS reports (party TEXT, member TEXT, until_s REAL, body BLOB, PRIMARY KEY (party, member))
  WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY AUTOINCREMENT, stream TEXT, body BLOB);
CREATE INDEX IF NOT EXISTS by_stream ON entries (stream, id);
CREATE TABLE IF NOT EXISTS lease (one INTEGER PRIMARY KEY CHECK (one = 1), holder TEXT, until_s REAL, epoch INTEGER);
"""
_decode = msgspec.json.Decoder(Document).decode


class SqliteStore:
    """See ``dynamollm.store.Store``."""

    def __init__(self, folder: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        """``folder`` None: in memory. ``clock``: seconds that all who share the file agree on."""
        self._folder = folder
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._turn = asyncio.Lock()
        self._published = asyncio.Event()

    async def read(self, name: str) -> Document | None:
        """See ``Store``."""
        rows = await self._ask("SELECT body FROM documents WHERE name = ?", (name,))
        return _document(name, rows[0][0]) if rows else None

    async def write(self, name: str, document: Mapping[str, Any]) -> None:
        """See ``Store``."""
        await self._ask("REPLACE INTO documents VALUES (?, ?)", (name, msgspec.json.encode(document)))

    async def publish(self, name: str, document: Mapping[str, Any], stamp: Stamp) -> bool:
        """See ``Store``."""
        rows = await self._ask(
            "INSERT INTO published VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE "
            "SET epoch = excluded.epoch, version = excluded.version, body = excluded.body "
            "WHERE (excluded.epoch, excluded.version) >= (epoch, version) RETURNING 1",
            (name, *stamp, msgspec.json.encode(document)),
        )
        self._published.set()
        return bool(rows)

    async def published(self, name: str, after: Stamp = NEVER) -> tuple[Stamp, Document] | None:
        """See ``Store``."""
        rows = await self._ask(
            "SELECT epoch, version, body FROM published WHERE name = ? AND (epoch, version) > (?, ?)", (name, *after)
        )
        return ((rows[0][0], rows[0][1]), _document(name, rows[0][2])) if rows else None

    async def nudged(self, timeout_s: float) -> None:
        """See ``Store``; other processes' publications are only seen by looking."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._published.wait()
        except TimeoutError:
            return
        self._published.clear()

    async def report(self, group: str, member: str, document: Mapping[str, Any], ttl_s: float) -> None:
        """See ``Store``."""
        until_s = self._clock() + ttl_s
        await self._ask(
            "REPLACE INTO reports VALUES (?, ?, ?, ?)", (group, member, until_s, msgspec.json.encode(document))
        )

    async def reports(self, group: str) -> dict[str, Document]:
        """See ``Store``."""
        now_s = self._clock()
        await self._ask("DELETE FROM reports WHERE until_s <= ?", (now_s,))
        rows = await self._ask("SELECT member, body FROM reports WHERE party = ? ORDER BY member", (group,))
        return {member: _document(member, body) for member, body in rows}

    async def append(self, stream: str, entries: Sequence[Mapping[str, Any]], most: int) -> None:
        """See ``Store``."""
        bodies = [(stream, msgspec.json.encode(entry)) for entry in entries]

        def add(connection: sqlite3.Connection) -> None:
            connection.executemany("INSERT INTO entries (stream, body) VALUES (?, ?)", bodies)
            connection.execute(
                "DELETE FROM entries WHERE stream = ? AND id <= "
                "(SELECT id FROM entries WHERE stream = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (stream, stream, most),
            )

        await self._run(add)

    async def entries(self, stream: str, after: str = BEGINNING, most: int = 1000) -> list[tuple[str, Document]]:
        """See ``Store``."""
        rows = await self._ask(
            "SELECT id, body FROM entries WHERE stream = ? AND id > ? ORDER BY id LIMIT ?",
            (stream, int(after or 0), most),
        )
        return [(str(number), _document(stream, body)) for number, body in rows]

    async def hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        """See ``Leadership``."""
        now_s = self._clock()

        def take(connection: sqlite3.Connection) -> int | None:
            row = connection.execute("SELECT holder, until_s, epoch FROM lease").fetchone()
            last, until_s, stored = row or (holder, now_s, 0)
            if last != holder and until_s > now_s:
                return None
            highest = max(epoch, seen_epoch, stored)
            term = epoch if 0 < epoch == highest else highest + 1
            connection.execute("REPLACE INTO lease VALUES (1, ?, ?, ?)", (holder, now_s + ttl_s, term))
            return term

        return await self._run(take)

    async def release(self, holder: str) -> None:
        """See ``Leadership``."""
        await self._ask("UPDATE lease SET until_s = 0 WHERE holder = ?", (holder,))

    async def close(self) -> None:
        """See ``Store``."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _ask(self, statement: str, values: Sequence[object]) -> list[Any]:
        return await self._run(lambda connection: connection.execute(statement, values).fetchall())

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do the work in one transaction; of a file in a thread, for the disk may be slow."""
        async with self._turn:
            return self._do(work) if self._folder is None else await asyncio.to_thread(self._do, work)

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            connection = self._connection or self._open()
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                return work(connection)
        except sqlite3.Error as error:
            raise OSError(f"store {self._folder or 'in memory'}: {error}") from None

    def _open(self) -> sqlite3.Connection:
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        place = ":memory:" if self._folder is None else str(self._folder / FILE)
        connection = sqlite3.connect(place, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(SCHEMA)
        self._connection = connection
        return connection


def _document(name: str, body: bytes) -> Document:
    try:
        return _decode(body)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{name}: {error}") from None
