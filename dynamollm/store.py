"""Store: what processes of one deployment share, and what outlives them. A port; see ``adapters/`` for its stores.

Documents by name; the published ones have a stamp (epoch, version) and only ever get newer; reports lapse when whoever
made them falls silent; streams keep their last entries in order. Nothing of it stands on a request's path: everybody
works on with what was last read while the store is away, and tries again.

Every method raises ``OSError`` where the store cannot be reached, within a second or two.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from dynamollm.leadership import Leadership

Document = dict[str, Any]  # plain values, as JSON has them
Stamp = tuple[int, int]  # epoch of the leader, version within it
NEVER: Stamp = (0, 0)
BEGINNING = ""  # before the first entry of a stream


class Store(Leadership, Protocol):
    """Contract tests: tests/dynamollm/test_store_contract.py runs one suite on every store."""

    async def read(self, name: str) -> Document | None:
        """The document, or None. Raises ``ValueError`` where it is not one."""

    async def write(self, name: str, document: Mapping[str, Any]) -> None:
        """Replace the document, whole or not at all."""

    async def publish(self, name: str, document: Mapping[str, Any], stamp: Stamp) -> bool:
        """Replace a published document, and nudge who waits; False, and nothing done, if a newer one stands."""

    async def published(self, name: str, after: Stamp = NEVER) -> tuple[Stamp, Document] | None:
        """The published document, if it is newer than ``after``."""

    async def nudged(self, timeout_s: float) -> None:
        """Return when something may have been published, or when the time is over. Never raises for the store."""

    async def report(self, group: str, member: str, document: Mapping[str, Any], ttl_s: float) -> None:
        """Replace a member's report; it lapses after ``ttl_s``."""

    async def reports(self, group: str) -> dict[str, Document]:
        """The reports of a group that have not lapsed, by member."""

    async def append(self, stream: str, entries: Sequence[Mapping[str, Any]], most: int) -> None:
        """Add entries at the end of a stream, of which about the last ``most`` are kept."""

    async def entries(self, stream: str, after: str = BEGINNING, most: int = 1000) -> list[tuple[str, Document]]:
        """Entries after the one of that id, oldest first, with their ids."""

    async def close(self) -> None:
        """Let go of connections."""
