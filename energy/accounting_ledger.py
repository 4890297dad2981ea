"""EnergyLedger: books every metered joule once, minute by minute, to whoever used it. Pure; given ``now_s``.

Told of requests as they go (``began``, ``first_token``, ``ended``) and of what the meters read (``metered``). An
interval is settled ``SETTLE_S`` after it ended, when most of what was in its requests' prefill is known; until then it
is in no report. Bounded: minutes beyond ``retention_s`` or ``max_rows`` are dropped, tenants beyond ``max_tenants`` are
booked as ``other``, a request never ended is forgotten after ``FORGET_S``. Costs are booked at the prices and the
carbon intensity of their minute.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any

import msgspec

from energy.accounting import EnergyRow, EnergyWindow, Interval, Prices, Use, User, UserRow
from energy.accounting_attribution import Serving, attribute
from energy.accounting_work import prefill_j, token_j, token_s
from energy.carbon import HOUR_S, J_PER_KWH, CarbonIntensity, co2_g
from energy.profile import StepCoefficients

MINUTE_S = 60.0
SETTLE_S = 3.0  # longer than a prompt takes (the longest TTFT promised is 2 s)
FORGET_S = 7200.0
LATE_S = 300.0  # what a meter says later than this after a request's end is no more booked to it
KEPT_UNMETERED = 64  # requests that ended on an instance that has not been metered yet: its first reading may come
OTHER = "other"
_FORMAT = 1
_SUMS = tuple(each.name for each in fields(EnergyRow))
_values = attrgetter(*_SUMS)  # of the rows of two days there are many, and while they are read nothing else happens


@dataclass(slots=True)
class _Account:
    """One instance: its requests, its unsettled intervals, how the meter compares with the profile."""

    running: dict[str, Serving] = field(default_factory=dict)  # by request
    ended: deque[Serving] = field(default_factory=deque)  # and not settled yet
    open: deque[Interval] = field(default_factory=deque)
    settled_s: float = float("-inf")
    coefficients: StepCoefficients | None = None
    gpus: int = 1
    scale: float = 1.0  # metered over expected energy, of the last interval with work
    seqs: float = 0.0  # running requests x seconds, up to ``seqs_s``
    seqs_s: float = 0.0

    def count(self, now_s: float) -> float:
        """Requests x seconds so far. Before any of them begins or ends."""
        seqs = self.seqs = self.seqs + len(self.running) * (now_s - self.seqs_s)
        self.seqs_s = now_s
        return seqs


class EnergyLedger:
    """The books of one gateway. ``unix_offset_s`` is what turns its clock into Unix seconds."""

    def __init__(
        self,
        carbon: CarbonIntensity,
        prices: Prices,
        unix_offset_s: float,
        retention_s: float = 48 * HOUR_S,
        max_rows: int = 200_000,
        max_tenants: int = 1000,
    ) -> None:
        self.metered_j = 0.0  # settled, since the start
        self.totals: dict[User, EnergyRow] = {}  # since the start, tenants left out
        self.tenant_j: dict[str, float] = {}  # since the start
        self._carbon = carbon
        self._prices = prices
        self._offset_s = unix_offset_s
        self._retention_s = retention_s
        self._max_rows = max_rows
        self._max_tenants = max_tenants
        self._tenants: set[str] = set()
        self._servings: dict[str, Serving] = {}  # those running
        self._accounts: dict[str, _Account] = {}
        self._minutes: dict[int, dict[User, EnergyRow]] = {}  # by Unix minute, ascending
        self._rows = 0
        self._unpriced: set[str] = set()
        self._tidied_s = float("-inf")
        self._page: dict[User, EnergyRow] = {}  # the rows of the present minute, which is, by our clock:
        self._row_begin_s = self._row_end_s = 0.0

    # --- requests ----------------------------------------------------------------------------------------------------

    def began(self, request_id: str, user: User, instance_id: str, input_tokens: int, now_s: float) -> None:
        """A request was sent to an instance. One sent a second time leaves the instance it was on."""
        if (before := self._servings.get(request_id)) is not None:
            self._close(before, now_s)
        account = self._accounts.get(instance_id)
        if account is None:
            account = self._accounts[instance_id] = _Account()
        if user.tenant not in self._tenants:
            user = self._bounded(user)
        serving = Serving(request_id, user, instance_id, now_s, input_tokens, seqs_before=account.count(now_s))
        self._servings[request_id] = account.running[request_id] = serving

    def knows(self, request_id: str) -> bool:
        """Whether a request began and has not ended."""
        return request_id in self._servings

    def first_token(self, request_id: str, now_s: float) -> None:
        """Its first token came; never told of an answer that is not streamed."""
        serving = self._servings.get(request_id)
        if serving is not None and serving.first_token_s is None:
            serving.first_token_s = now_s

    def _close(self, serving: Serving, now_s: float) -> None:
        serving.end_s = now_s
        account = self._accounts[serving.instance_id]
        account.count(now_s)
        del account.running[serving.id]
        account.ended.append(serving)
        if account.coefficients is None and len(account.ended) > KEPT_UNMETERED:
            account.ended.popleft()

    def ended(
        self, request_id: str, now_s: float, input_tokens: int | None = None, output_tokens: int | None = None
    ) -> None:
        """It is over, answered or not; tokens where the engine said them. Ask for its ``energy_j`` before."""
        serving = self._servings.pop(request_id, None)
        if serving is None:
            return
        self._close(serving, now_s)
        if input_tokens is not None:
            serving.input_tokens = input_tokens
        if not self._row_begin_s <= now_s < self._row_end_s:
            self._turn_page(now_s)
        row = self._page.get(serving.user)
        if row is None:
            row = self._row(self._unix_minute(now_s), serving.user)
        row.requests += 1
        row.input_tokens += serving.input_tokens
        row.output_tokens += output_tokens or 0

    def _turn_page(self, now_s: float) -> None:
        """A minute is over: the next one's rows."""
        minute = self._unix_minute(now_s)
        self._page = self._minutes.setdefault(minute, {})
        self._row_begin_s = minute * MINUTE_S - self._offset_s
        self._row_end_s = self._row_begin_s + MINUTE_S
        if now_s > self._tidied_s + LATE_S:  # where nobody meters, nobody settles
            self._tidy(now_s)

    def energy_j(self, request_id: str, now_s: float, output_tokens: int | None = None) -> float | None:
        """Energy of a request in flight, up to now: what is settled, and an estimate of what is not.

        ``output_tokens`` so far, where known. None for one that is not in flight, or whose instance was never metered.
        """
        serving = self._servings.get(request_id)
        return None if serving is None else self._energy_j(serving, now_s, output_tokens)

    def _energy_j(self, serving: Serving, now_s: float, output_tokens: int | None) -> float | None:
        account = self._accounts[serving.instance_id]
        c, gpus, settled_s = account.coefficients, account.gpus, account.settled_s
        if c is None:
            return None
        (worked_s, first_s), _ = serving.spans(c)
        first_s = min(first_s, now_s)
        life_s = now_s - serving.begin_s
        batch = max(1.0, (account.count(now_s) - serving.seqs_before) / life_s) if life_s > 0.0 else 1.0
        open_j = 0.0
        if first_s > (from_s := max(worked_s, settled_s)):
            open_j = (first_s - from_s) / (first_s - worked_s) * prefill_j(c, gpus, serving.input_tokens, batch)
        if now_s > (from_s := max(first_s, settled_s)):
            decoded_s = now_s - first_s
            tokens = float(output_tokens or decoded_s / token_s(c, batch, serving.input_tokens))
            open_tokens = tokens * (now_s - from_s) / decoded_s
            open_j += open_tokens * token_j(c, gpus, batch, serving.input_tokens + 0.5 * tokens)
        return serving.prefill_j + serving.decode_j + open_j * account.scale

    def _bounded(self, user: User) -> User:
        if user.tenant in self._tenants:
            return user
        if len(self._tenants) < self._max_tenants:
            self._tenants.add(user.tenant)
            return user
        return User(user.model, user.pool, user.request_class, OTHER)

    # --- meters ------------------------------------------------------------------------------------------------------

    def metered(self, interval: Interval) -> None:
        """What an instance's GPUs drew between two readings. Intervals of an instance come in order of time."""
        instance = interval.instance
        account = self._accounts.setdefault(instance.id, _Account())
        account.coefficients = instance.coefficients or account.coefficients
        account.gpus = instance.gpus
        account.open.append(interval)

    def settle(self, now_s: float, wait_s: float = SETTLE_S) -> None:
        """Book the intervals that ended ``wait_s`` ago. Call after each reading of the meters."""
        for _ in self.settling(now_s, wait_s):
            pass

    def settling(self, now_s: float, wait_s: float = SETTLE_S) -> Iterator[None]:
        """Do what ``settle`` does, instance by instance, for those who have other things to do in between."""
        for account in tuple(self._accounts.values()):
            while account.open and account.open[0].end_s <= now_s - wait_s:
                self._settle(account, account.open.popleft())
            yield
        self._tidy(now_s)

    def _tidy(self, now_s: float) -> None:
        """Let go of what is settled, over or too old."""
        self._tidied_s = now_s
        for instance_id, account in tuple(self._accounts.items()):
            self._forget(account, now_s)
            if not account.running and not account.ended and not account.open and account.settled_s < now_s - FORGET_S:
                del self._accounts[instance_id]
        self._trim(now_s)

    def _settle(self, account: _Account, interval: Interval) -> None:
        for piece in self._by_minute(interval):
            attribution = attribute(piece, (*account.running.values(), *account.ended))
            if attribution.scale is not None:
                account.scale = attribution.scale
            minute = self._unix_minute(piece.begin_s)
            by_user: dict[User, EnergyRow] = {}
            for part in attribution.parts:
                part.serving.prefill_j += part.prefill_j
                part.serving.decode_j += part.decode_j
                sums = by_user.setdefault(part.serving.user, EnergyRow())
                sums.prefill_j += part.prefill_j
                sums.decode_j += part.decode_j
            for user, sums in by_user.items():
                self._book(minute, user, sums, piece)
            instance = piece.instance
            rest = EnergyRow(idle_j=attribution.rest_j)
            if instance.use is Use.TRANSITION:
                rest = EnergyRow(transition_j=attribution.rest_j)
            self._book(minute, User(instance.model, instance.pool, "", ""), rest, piece)
            self.metered_j += piece.energy_j
        account.settled_s = max(account.settled_s, interval.end_s)

    def _by_minute(self, interval: Interval) -> list[Interval]:
        """The interval, cut where minutes part; its energy goes by time."""
        pieces = []
        begin_s, length_s = interval.begin_s, interval.end_s - interval.begin_s
        while begin_s < interval.end_s:
            next_s = (self._unix_minute(begin_s) + 1) * MINUTE_S - self._offset_s
            end_s = interval.end_s if next_s <= begin_s else min(next_s, interval.end_s)
            energy_j = interval.energy_j * (end_s - begin_s) / length_s
            pieces.append(Interval(interval.instance, begin_s, end_s, energy_j))
            begin_s = end_s
        return pieces

    def _book(self, minute: int, user: User, sums: EnergyRow, piece: Interval) -> None:
        """Book joules, and with them their share of the piece's GPU time, CO2 and money."""
        if not sums.energy_j:
            return
        instance = piece.instance
        sums.gpu_s = instance.gpus * (piece.end_s - piece.begin_s) * sums.energy_j / piece.energy_j
        sums.co2_g = co2_g(sums.energy_j, self._carbon.g_per_kwh(minute * MINUTE_S))
        sums.electricity_usd = sums.energy_j / J_PER_KWH * self._prices.electricity_usd_per_kwh
        if (hour_usd := self._prices.gpu_hour_usd.get(instance.gpu)) is None:
            self._unpriced.add(instance.gpu)
        else:
            sums.gpu_usd = sums.gpu_s / HOUR_S * hour_usd
        self._row(minute, user).add(sums)
        self.totals.setdefault(User(user.model, user.pool, user.request_class, ""), EnergyRow()).add(sums)
        if user.tenant:
            self.tenant_j[user.tenant] = self.tenant_j.get(user.tenant, 0.0) + sums.energy_j

    def _forget(self, account: _Account, now_s: float) -> None:
        """Let go of requests that are settled, and of those nobody ever ended."""
        for serving in [s for s in account.running.values() if s.begin_s < now_s - FORGET_S]:
            self._close(serving, now_s)
            del self._servings[serving.id]
        settled_s = max(account.settled_s, now_s - LATE_S)
        while account.ended and (account.ended[0].end_s or now_s) <= settled_s:
            account.ended.popleft()

    # --- rows --------------------------------------------------------------------------------------------------------

    def _unix_minute(self, now_s: float) -> int:
        return int((now_s + self._offset_s) // MINUTE_S)

    def _row(self, minute: int, user: User) -> EnergyRow:
        rows = self._minutes.setdefault(minute, {})
        if user not in rows:
            rows[user] = EnergyRow()
            self._rows += 1
        return rows[user]

    def _trim(self, now_s: float) -> None:
        oldest = self._unix_minute(now_s - self._retention_s)
        for minute in sorted(self._minutes):
            if minute >= oldest and self._rows <= self._max_rows:
                break
            self._rows -= len(self._minutes.pop(minute))
            self._row_end_s = self._row_begin_s  # it may have been the present one

    def window(self, since_s: float, now_s: float) -> EnergyWindow:
        """The last ``since_s`` seconds (as far as they are kept), from the start of the minute they begin in."""
        back_s = min(since_s, self._retention_s) if since_s > 0.0 else 0.0
        first = self._unix_minute(now_s - back_s)
        sums: dict[User, EnergyRow] = {}
        for minute, rows in self._minutes.items():
            if minute >= first:
                for user, row in rows.items():
                    sums.setdefault(user, EnergyRow()).add(row)
        return EnergyWindow(
            begin_unix_s=first * MINUTE_S,
            end_unix_s=now_s + self._offset_s,
            rows=tuple(UserRow(user, row) for user, row in sums.items()),
            carbon_source=self._carbon.source,
            unpriced_gpus=tuple(sorted(self._unpriced)),
        )

    def snapshot(self) -> dict[str, Any]:
        """All booked minutes, as a document of plain values. What is not settled is not in it."""
        rows = [
            {"minute": minute, **msgspec.structs.asdict(user), **dict(zip(_SUMS, _values(row), strict=True))}
            for minute, users in self._minutes.items()
            for user, row in users.items()
        ]
        return {"format": _FORMAT, "metered_j": self.metered_j, "rows": rows}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Add what a snapshot holds to what is booked. Raises ``ValueError`` for a document that is none."""
        if document.get("format") != _FORMAT:
            raise ValueError(f"not an energy ledger's snapshot of format {_FORMAT}")
        try:
            entries = [(int(entry["minute"]), _user(entry), _sums(entry)) for entry in document["rows"]]
            metered_j = float(document["metered_j"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"an energy ledger's snapshot lacks {error}") from None
        for minute, user, row in entries:
            self._row(minute, user).add(row)
        self.metered_j += metered_j
        self._tenants |= {user.tenant for _, user, _ in entries if user.tenant}


def _user(entry: Mapping[str, Any]) -> User:
    return User(entry["model"], entry["pool"], entry["request_class"], entry["tenant"])


def _sums(entry: Mapping[str, Any]) -> EnergyRow:
    return EnergyRow(**{name: entry[name] for name in _SUMS})
