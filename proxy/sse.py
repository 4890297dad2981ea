"""Server-sent events as an engine sends them: what must be known of them, and nothing more.

``EventFilter`` lets whole events through. An event split over TCP segments is held until its end, so an engine that
dies in the middle never leaves half an event before the error event that follows. It finds the usage event, and takes
it out where the client had not asked for one (the gateway had, for accounting).

Everything is decided from bytes; JSON is decoded only in the events that can matter: the first, and those with usage.
"""

from collections.abc import Callable
from typing import Any

import msgspec

END = b"\n\n"
DONE = b"data: [DONE]\n\n"
_USAGE = b'"usage"'
_LONGEST_EVENT_BYTES = 2**20  # a longer one is let through as it comes


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, as the engine counted them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Answer(msgspec.Struct):
    """A chunk, or a whole answer."""

    usage: Usage | None = None
    choices: list[msgspec.Raw] = []


class _Error(msgspec.Struct):
    error: msgspec.Raw = msgspec.Raw(b"null")
    code: int | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_error = msgspec.json.Decoder(_Error).decode
_decode_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def usage_of(answer: bytes) -> Usage | None:
    """The usage in a whole answer or one chunk; None where there is none or it cannot be read."""
    try:
        return _decode_answer(answer).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def first_event(held: bytes) -> bytes | None:
    """The data of the first event that has any (comments are none); None while it is not complete."""
    start = 0
    while (end := held.find(END, start)) >= 0:
        event = held[start:end].lstrip(b"\r\n")
        if event.startswith(b"data:"):
            return event[5:].strip()
        start = end + 2
    return None


def error_status(data: bytes) -> int | None:
    """The status an error event stands for; None for any other event. Without a sane code it is 500."""
    if b'"error"' not in data[:64]:
        return None
    try:
        error = _decode_error(data).error
        if bytes(error) == b"null":
            return None
        fields: Any = msgspec.json.decode(error)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    code = fields.get("code") if isinstance(fields, dict) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def with_tier(answer: bytes, service_tier: str) -> bytes:
    """An answer or chunk that says which tier served it; unreadable ones stay as they are."""
    try:
        members = _decode_members(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return answer
    members["service_tier"] = msgspec.Raw(_encode(service_tier))
    return _encode(members)


def with_energy(chunk: bytes, energy_j: float) -> bytes:
    """A chunk whose usage also says the request's energy, in millijoules as in the header of whole answers."""
    members = _decode_members(chunk)
    usage = _decode_members(members["usage"])
    usage["energy_mj"] = msgspec.Raw(_encode(round(energy_j * 1000)))
    members["usage"] = msgspec.Raw(_encode(usage))
    return _encode(members)


class EventFilter:
    """Whole events in, whole events out; ``usage`` is known once its event has passed.

    ``energy_j``, where the client asked for it, tells what a request with this usage took; None where nobody knows.
    """

    __slots__ = ("_energy_j", "_held", "_strip_usage", "_tier", "usage")

    def __init__(
        self, strip_usage: bool, tier: str | None = None, energy_j: Callable[[Usage], float | None] | None = None
    ) -> None:
        self.usage: Usage | None = None
        self._energy_j = energy_j
        self._held = b""
        self._strip_usage = strip_usage
        self._tier = tier

    def feed(self, data: bytes) -> bytes:
        """What of the stream goes on to the client now."""
        if data[-2:] == END and not self._held and _USAGE not in data and self._tier is None:  # mostly
            return data
        if self._held:
            data = self._held + data
            self._held = b""
        if data[-2:] != END:
            cut = data.rfind(END) + 2 if END in data else 0
            if len(data) - cut > _LONGEST_EVENT_BYTES:
                return data
            self._held = data[cut:]
            data = data[:cut]
        if _USAGE in data or self._tier is not None:
            return b"".join(map(self._passed, data.split(END)))
        return data

    def rest(self) -> bytes:
        """What is held when the stream ends well: an end without its blank line."""
        held, self._held = self._held, b""
        return held

    def _passed(self, event: bytes) -> bytes:
        if not event:
            return b""
        if event.startswith(b"data:") and _USAGE in event:
            try:
                answer = _decode_answer(event[5:])
            except (msgspec.DecodeError, UnicodeDecodeError):
                return event + END
            self.usage = answer.usage or self.usage
            if self._strip_usage and answer.usage is not None and not answer.choices:
                return b""
            if self._energy_j is not None and answer.usage is not None and not answer.choices:
                energy_j = self._energy_j(answer.usage)
                event = event if energy_j is None else b"data: " + with_energy(event[5:], energy_j)
        if self._tier is not None and event.startswith(b"data: {"):
            event = b"data: " + with_tier(event[6:], self._tier)
        return event + END
