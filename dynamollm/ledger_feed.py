"""The ledger of many gateways: each feeds a stream with what its requests did, the leader books it. Pure.

``LedgerFeed`` stands where the ledger does in a gateway alone: plain calls on a request's path, no I/O. What it takes
in is cut into numbered batches, and kept until the leader says it has booked them: a store that is away, or comes back
with nothing, costs no request, as long as the feed's bound holds. ``LedgerTail`` books each batch once, in order. The
end of a request repeats its beginning, so that a leader that has not seen that books it all the same.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from energy.accounting import User
from energy.accounting_ledger import EnergyLedger

MOST_ENTRIES = 300_000  # of about 200 bytes; at 100 requests/s, a quarter of an hour
RESEND_S = 5.0  # sent and not booked for so long: the store may have forgotten it
MOST_BEHIND_S = 600.0  # energy is booked no later than this, heard of or not
BEGAN, FIRST, ENDED = "b", "f", "e"

Entry = list[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one gateway, in order of time, up to a time."""

    number: int
    until_unix_s: float
    entries: tuple[Entry, ...]


@dataclass(slots=True)
class _Open:
    """A request in flight."""

    user: User
    instance_id: str
    input_tokens: int
    began_unix_s: float
    first_unix_s: float | None = None


class LedgerFeed:
    """See ``dynamollm.accounts.Ledger``; the other half is ``cut``, ``to_send``, ``sent`` and ``booked``."""

    def __init__(self, unix_offset_s: float, most_entries: int = MOST_ENTRIES) -> None:
        """``unix_offset_s`` is what turns the gateway's clock into Unix seconds."""
        self.batches = 0  # cut so far
        self.lost_entries = 0  # beyond the bound
        self._offset_s = unix_offset_s
        self._most = most_entries
        self._requests: dict[str, _Open] = {}
        self._entries: list[Entry] = []
        self._kept: deque[Batch] = deque()  # not booked yet
        self._kept_entries = 0
        self._sent = 0  # number of the last batch sent
        self._progress_s = 0.0  # when something was last booked, or nothing was waiting

    def began(self, request_id: str, user: User, instance_id: str, input_tokens: int, now_s: float) -> None:
        """A request was sent to an instance, or to another one."""
        at = now_s + self._offset_s
        self._requests[request_id] = _Open(user, instance_id, input_tokens, at)
        self._entries.append([BEGAN, request_id, *_user(user), instance_id, input_tokens, at])

    def first_token(self, request_id: str, now_s: float) -> None:
        """Its first token came."""
        request = self._requests.get(request_id)
        if request is not None and request.first_unix_s is None:
            request.first_unix_s = at = now_s + self._offset_s
            self._entries.append([FIRST, request_id, at])

    def ended(
        self, request_id: str, now_s: float, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> None:
        """It is over, answered or not."""
        r = self._requests.pop(request_id, None)
        if r is not None:
            times = r.began_unix_s, r.first_unix_s, now_s + self._offset_s
            place = *_user(r.user), r.instance_id, r.input_tokens
            self._entries.append([ENDED, request_id, *place, *times, input_tokens, output_tokens])

    def energy_j(self, request_id: str, now_s: float, output_tokens: int | None = None) -> float | None:
        """None: who meters is elsewhere."""
        return None

    # --- towards the stream ------------------------------------------------------------------------------------------

    def cut(self, now_s: float) -> None:
        """Make a batch of what came since the last."""
        if self._entries:
            self.batches += 1
            self._kept.append(Batch(self.batches, now_s + self._offset_s, tuple(self._entries)))
            self._kept_entries += len(self._entries)
            self._entries = []
        while self._kept_entries > self._most and len(self._kept) > 1:
            gone = self._kept.popleft()
            self._kept_entries -= len(gone.entries)
            self.lost_entries += len(gone.entries)

    @property
    def backlog(self) -> int:
        """Entries that are not booked, as far as is known."""
        return self._kept_entries + len(self._entries)

    def to_send(self, now_s: float) -> list[Batch]:
        """Those that were not sent, or were sent and may be lost."""
        if not self._kept or self._sent < self._kept[0].number:
            self._progress_s = now_s
        elif now_s > self._progress_s + RESEND_S:
            self.send_again()
            self._progress_s = now_s
        return [batch for batch in self._kept if batch.number > self._sent]

    def sent(self, batches: Iterable[Batch]) -> None:
        """These are in the stream."""
        self._sent = max((batch.number for batch in batches), default=self._sent)

    def send_again(self) -> None:
        """The store failed: what is not booked may not be there any more."""
        self._sent = 0

    def booked(self, number: int, now_s: float) -> None:
        """The controller has booked all batches up to this one."""
        while self._kept and self._kept[0].number <= number:
            self._kept_entries -= len(self._kept.popleft().entries)
            self._progress_s = now_s

    def documents(self, name: str, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """Batches as the stream has them; ``first`` is the oldest that this gateway can still send."""
        first = self._kept[0].number if self._kept else self.batches + 1
        return [
            {"gateway": name, "number": b.number, "first": first, "until": b.until_unix_s, "entries": b.entries}
            for b in batches
        ]


class LedgerTail:
    """Books what gateways fed; what it remembers is saved with the ledger, so that both are of one moment."""

    def __init__(self, ledger: EnergyLedger, unix_offset_s: float) -> None:
        self.position = ""  # of the last entry read
        self.booked: dict[str, int] = {}  # number of the last batch, by gateway
        self.lost_batches = 0
        self._ledger = ledger
        self._offset_s = unix_offset_s
        self._until_unix_s: dict[str, float] = {}
        self._heard_s = float("-inf")

    def take(self, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Book the batches that come next; those booked before, and those after a gap, are left for another time."""
        for position, batch in entries:
            self.position = position
            gateway, number = batch["gateway"], batch["number"]
            expected = self.booked.get(gateway, 0) + 1
            if number < expected:
                continue
            if number > expected:
                if batch["first"] <= expected and gateway in self.booked:
                    continue  # it has what is missing, and sends it again
                self.lost_batches += number - expected if gateway in self.booked else 0
            for entry in batch["entries"]:
                self._book(entry)
            self.booked[gateway] = number
            self._until_unix_s[gateway] = batch["until"]

    def _book(self, entry: Entry) -> None:
        ledger, offset_s = self._ledger, self._offset_s
        kind, request_id = entry[:2]
        if kind == FIRST:
            ledger.first_token(request_id, entry[2] - offset_s)
            return
        model, pool, request_class, tenant, instance_id, input_tokens, began = entry[2:9]
        if kind == BEGAN or not ledger.knows(request_id):
            user = User(model, pool, request_class, tenant)
            ledger.began(request_id, user, instance_id, input_tokens, began - offset_s)
        if kind == ENDED:
            first, ended, prompt_tokens, completion_tokens = entry[9:]
            if first is not None:
                ledger.first_token(request_id, first - offset_s)
            ledger.ended(request_id, ended - offset_s, prompt_tokens, completion_tokens)

    def heard_s(self, batches: Mapping[str, tuple[int, float]], now_s: float, reachable: bool) -> float:
        """Up to when every gateway's requests are booked, on the ledger's clock: energy may be booked until then.

        ``batches``: of each gateway that is there, how many it has cut, as of which Unix time.
        """
        if reachable:
            until = [
                at_unix_s if self.booked.get(name, 0) >= count else self._until_unix_s.get(name, 0.0)
                for name, (count, at_unix_s) in batches.items()
            ]
            heard_s = min(until, default=now_s + self._offset_s) - self._offset_s
            self._heard_s = max(self._heard_s, min(heard_s, now_s))
        return max(self._heard_s, now_s - MOST_BEHIND_S)

    def snapshot(self) -> dict[str, Any]:
        """The ledger's snapshot, and up to where it is booked."""
        return {**self._ledger.snapshot(), "position": self.position, "booked": dict(self.booked)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take a snapshot over. Raises ``ValueError`` if it is not one."""
        self._ledger.restore(snapshot)
        self.position = str(snapshot.get("position", ""))
        self.booked = {str(name): int(number) for name, number in snapshot.get("booked", {}).items()}


def _user(user: User) -> tuple[str, str, str, str]:
    return user.model, user.pool, user.request_class, user.tenant
