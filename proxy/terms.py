"""Terms: what a request's headers ask for, and which headers go on to the instance.

Control headers are read and stripped. Hop-by-hop headers (RFC 9110 section 7.6.1) end here, those named by
``Connection`` included. A bad control value never fails the request: it counts as absent and is named in ``invalid``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Headers = Sequence[tuple[bytes, bytes]]

DEFAULT_TENANT = "default-flow"
_TTFT, _TBT, _TENANT, _OBJECTIVE, _REQUEST_ID, _KEY = "ttft", "tbt", "tenant", "objective", "request-id", "key"
_CONNECTION, _ENDS_HERE = "connection", "ends-here"
_ALIAS = "alias-of-"

_ROLES: Mapping[bytes, str] = {
    b"x-llm-d-slo-ttft-ms": _TTFT,
    b"x-slo-ttft-ms": _ALIAS + _TTFT,
    b"x-llm-d-slo-tpot-ms": _TBT,
    b"x-slo-tpot-ms": _ALIAS + _TBT,
    b"x-llm-d-inference-fairness-id": _TENANT,
    b"x-gateway-inference-fairness-id": _ALIAS + _TENANT,
    b"x-llm-d-inference-objective": _OBJECTIVE,
    b"x-gateway-inference-objective": _ALIAS + _OBJECTIVE,
    b"x-request-id": _REQUEST_ID,
    b"authorization": _KEY,
    b"connection": _CONNECTION,
    # hop by hop, or true of this hop only
    b"host": _ENDS_HERE,
    b"content-length": _ENDS_HERE,
    b"transfer-encoding": _ENDS_HERE,
    b"keep-alive": _ENDS_HERE,
    b"proxy-connection": _ENDS_HERE,
    b"proxy-authenticate": _ENDS_HERE,
    b"proxy-authorization": _ENDS_HERE,
    b"te": _ENDS_HERE,
    b"trailer": _ENDS_HERE,
    b"upgrade": _ENDS_HERE,
    b"expect": _ENDS_HERE,
    b"accept-encoding": _ENDS_HERE,  # an answer must be readable here
    b"content-encoding": _ENDS_HERE,
}
_HOP_BY_HOP_OUT = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"te", b"trailer", b"upgrade"}
)
OWN_OUT = b"x-dynamollm-"
NOT_PASSED_OUT = _HOP_BY_HOP_OUT | {b"content-length", b"transfer-encoding", b"x-request-id", b"server"}
"""Response headers of an instance that the gateway replaces or that end at this hop."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the headers ask for; None = nothing asked."""

    ttft_s: float | None = None
    tbt_s: float | None = None
    tenant: str = DEFAULT_TENANT
    objective: str | None = None
    request_id: bytes | None = None
    authorization: bytes | None = None
    invalid: tuple[str, ...] = ()


_NO_TERMS = Terms()


def read_headers(headers: Headers, slo_bounds_s: tuple[float, float]) -> tuple[Terms, list[bytes]]:
    """The terms, and the header lines to pass on. Names are in lower case."""
    passed = []
    control: dict[str, bytes] = {}
    for name, value in headers:
        role = _ROLES.get(name)
        if role is None:
            passed.append(b"%b: %b\r\n" % (name, value))
        elif role is not _ENDS_HERE:
            control.setdefault(role, value)
    if not control:
        return _NO_TERMS, passed
    if _CONNECTION in control:
        passed = _without_named(passed, [value for name, value in headers if name == b"connection"])
    return _terms(control, slo_bounds_s), passed


def _without_named(passed: list[bytes], connection: list[bytes]) -> list[bytes]:
    named = {token.strip().lower() for value in connection for token in value.split(b",")} - {b"close", b"keep-alive"}
    return [line for line in passed if line.partition(b":")[0] not in named] if named else passed


def _terms(control: dict[str, bytes], slo_bounds_s: tuple[float, float]) -> Terms:
    invalid: list[str] = []
    return Terms(
        _latency_s(control, _TTFT, slo_bounds_s, invalid),
        _latency_s(control, _TBT, slo_bounds_s, invalid),
        _name(control, _TENANT, invalid) or DEFAULT_TENANT,
        _name(control, _OBJECTIVE, invalid),
        _request_id(control.get(_REQUEST_ID), invalid),
        control.get(_KEY),
        tuple(invalid),
    )


def _value(control: dict[str, bytes], role: str) -> bytes | None:
    """The canonical header's value, else its alias's."""
    value = control.get(role)
    return control.get(_ALIAS + role) if value is None else value


def _latency_s(control: dict[str, bytes], role: str, bounds_s: tuple[float, float], invalid: list[str]) -> float | None:
    value = _value(control, role)
    if value is None:
        return None
    try:
        latency_s = float(value) / 1000.0
    except ValueError:
        latency_s = -1.0
    if bounds_s[0] <= latency_s <= bounds_s[1]:  # false for NaN too
        return latency_s
    invalid.append(role)
    return None


def _name(control: dict[str, bytes], role: str, invalid: list[str]) -> str | None:
    value = _value(control, role)
    if value is None:
        return None
    name = value.decode("latin-1").strip()
    if 0 < len(name) <= 256 and name.isprintable():
        return name
    invalid.append(role)
    return None


def _request_id(value: bytes | None, invalid: list[str]) -> bytes | None:
    if value is None:
        return None
    if 0 < len(value) <= 128 and value.isascii() and value.decode("ascii").isprintable() and b" " not in value:
        return value
    invalid.append(_REQUEST_ID)
    return None
