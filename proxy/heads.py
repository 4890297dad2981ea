"""ClientHead and InstanceHead: what is made of a head's headers, once; who keeps a connection sends the same again.

Hop-by-hop headers (RFC 9110 section 7.6.1) end here, those named by ``Connection`` included. The length of a body is no
part of either: it differs from message to message, and belongs to the framing.
"""

from collections.abc import Sequence

from proxy import errors, wire
from proxy.errors import ApiError
from proxy.terms import NOT_PASSED, OWN_OUT, Terms, read_terms

Headers = Sequence[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"te", b"trailer", b"upgrade")
)
_NOT_PASSED_BACK = _HOP_BY_HOP | {b"content-length", b"transfer-encoding", b"x-request-id", b"server"}
_EVENT_STREAM = b"text/event-stream"


class ClientHead:
    """The headers of a relayed request, read. Names in any case."""

    __slots__ = ("authorized", "expects_continue", "hosts", "passed_lines", "size_bytes", "terms")

    def __init__(self, headers: Headers, slo_bounds_s: tuple[float, float]) -> None:
        lowered = [(name.lower(), value) for name, value in headers]
        named = _named_by_connection(lowered)
        self.size_bytes = sum(len(name) + len(value) for name, value in headers)
        self.hosts = sum(name == b"host" for name, _ in lowered)
        self.expects_continue = any(name == b"expect" and value.lower() == b"100-continue" for name, value in lowered)
        self.passed_lines = wire.header_lines(
            header for header in lowered if header[0] not in NOT_PASSED and header[0] not in named
        )
        self.terms: Terms = read_terms(lowered, slo_bounds_s)
        self.authorized = True

    def refusal(self, target: bytes, http_1_0: bool, limit_bytes: int) -> ApiError | None:
        """Why a request with this head and target is refused; None where it is not."""
        if self.size_bytes + len(target) > limit_bytes:
            return errors.head_too_large(limit_bytes)
        if not target.startswith(b"/"):
            return errors.bad_request("The request target must be a path")
        if self.hosts != 1 and (self.hosts or not http_1_0):
            return errors.bad_request("A request needs exactly one Host header")
        return None


class InstanceHead:
    """The status and headers of an instance's answer, read. Names in any case. ``lines``: what of it is passed on."""

    __slots__ = ("lines", "status", "stream")

    def __init__(self, status: int, headers: Headers) -> None:
        lowered = [(name.lower(), value) for name, value in headers]
        not_passed = _NOT_PASSED_BACK | _named_by_connection(lowered)
        kind = next((value for name, value in lowered if name == b"content-type"), b"")
        self.status = status
        self.stream = status == 200 and kind.startswith(_EVENT_STREAM)
        self.lines = wire.status_line(status) + wire.header_lines(
            header for header in lowered if header[0] not in not_passed and not header[0].startswith(OWN_OUT)
        )


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Headers that end here because ``Connection`` says so."""
    values = [value for name, value in headers if name == b"connection"]
    return frozenset(token.strip().lower() for value in values for token in value.split(b","))
