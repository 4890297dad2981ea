"""Terms: what a request's headers ask for.

Control headers are read here and go no further. A bad value never fails the request: it counts as absent and is named
in ``invalid``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_TENANT = "default-flow"
_TTFT, _TBT, _TENANT, _OBJECTIVE, _REQUEST_ID, _KEY = "ttft", "tbt", "tenant", "objective", "request-id", "key"
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
}
_THIS_HOP_ONLY = frozenset(
    (
        b"connection",
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"upgrade",
        b"expect",
        b"accept-encoding",  # an answer must be readable here
        b"content-encoding",
    )
)
NOT_PASSED = _THIS_HOP_ONLY.union(_ROLES)
"""Request headers that do not go on to an instance as they came."""
OWN_OUT = b"x-dynamollm-"
"""Prefix of the response headers that only the gateway sets."""


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


def read_terms(headers: Sequence[tuple[bytes, bytes]], slo_bounds_s: tuple[float, float]) -> Terms:
    """What headers ask for; names are in lower case. Of several of one name the first counts."""
    control: dict[str, bytes] = {}
    for name, value in headers:
        role = _ROLES.get(name)
        if role is not None:
            control.setdefault(role, value)
    return _terms(control, slo_bounds_s) if control else _NO_TERMS


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
