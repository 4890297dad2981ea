"""Who an interval's joules belong to: pure, one interval of one instance and the requests on it at a time.

The requests on the instance share what it drew in proportion to their token work in that time: prefill spread over the
time just before the first token, decoding over the time after it in which no prompt is worked on (all sequences of a
batch advance together, and wait for a prompt together). Time in which none was at work is idle time, at the idle power
of the profile, and never more than the meter says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from energy.accounting import Interval, User
from energy.accounting_work import prefill_j, prefill_s, token_j, token_s
from energy.profile import StepCoefficients

Span = tuple[float, float]  # from, to
Floats = NDArray[np.float64]


class Serving(msgspec.Struct, eq=False, gc=False):
    """One request on one instance, and what it was given so far. Times are of the ledger's clock."""

    id: str
    user: User
    instance_id: str
    begin_s: float
    input_tokens: int
    first_token_s: float | None = None
    end_s: float | None = None
    prefill_j: float = 0.0  # settled so far
    decode_j: float = 0.0
    seqs_before: float = 0.0  # requests x seconds on its instance when it began

    def spans(self, c: StepCoefficients) -> tuple[Span, Span]:
        """When its prompt was worked on, and when it decoded (endless while it runs).

        One whose first token was not seen is taken to have been worked on as soon as it was sent: an answer that is
        not streamed shows none, and who asks this late (``SETTLE_S``) has seen those of the others.
        """
        alone_s: float = prefill_s(c, self.input_tokens)
        end_s = float("inf") if self.end_s is None else self.end_s
        if self.first_token_s is None:
            first_s = min(self.begin_s + alone_s, end_s)
            return (self.begin_s, first_s), (first_s, end_s)
        return (max(self.begin_s, self.first_token_s - alone_s), self.first_token_s), (self.first_token_s, end_s)


@dataclass(frozen=True, slots=True)
class Part:
    """One request's joules of an interval."""

    serving: Serving
    prefill_j: float
    decode_j: float


@dataclass(frozen=True, slots=True)
class Attribution:
    """An interval's joules, all of them: those of requests, and the rest. ``scale`` is metered over expected energy."""

    parts: tuple[Part, ...]
    rest_j: float
    scale: float | None


def attribute(interval: Interval, servings: Sequence[Serving]) -> Attribution:
    """Share an interval's energy among these requests. The parts and the rest sum to it exactly (to rounding)."""
    c = interval.instance.coefficients
    if c is None or not servings:
        return Attribution((), interval.energy_j, None)
    works = _works(interval, c, servings)
    total_j = float(works.prefill_j.sum() + works.decode_j.sum())
    if total_j <= 0.0:
        return Attribution((), interval.energy_j, None)
    idle_s = (interval.end_s - interval.begin_s) - works.busy_s
    idle_j = min(interval.energy_j, idle_s * interval.instance.idle_w * interval.instance.gpus)
    scale = (interval.energy_j - idle_j) / total_j
    shares = zip(servings, (works.prefill_j * scale).tolist(), (works.decode_j * scale).tolist(), strict=True)
    return Attribution(tuple(Part(*share) for share in shares if share[1] or share[2]), idle_j, scale)


@dataclass(frozen=True, slots=True)
class _Works:
    """Expected joules of each request in an interval, and for how long any of them was at work."""

    prefill_j: Floats
    decode_j: Floats
    busy_s: float


def _works(interval: Interval, c: StepCoefficients, servings: Sequence[Serving]) -> _Works:
    gpus, begin_s, end_s = interval.instance.gpus, interval.begin_s, interval.end_s
    spans = np.array([[*prefill, decode[1]] for prefill, decode in (s.spans(c) for s in servings)])
    tokens = np.array([s.input_tokens for s in servings], dtype=np.float64)
    # columns: prefill begins, first token, end; those of the interval are cut to it
    cut = np.clip(spans, begin_s, end_s)
    prefilling_s = cut[:, 1] - cut[:, 0]
    decoding_s = np.maximum(cut[:, 2] - cut[:, 1], 0.0)

    stalls = _merged(cut[:, :2])
    decode_s = float(decoding_s.sum())
    # mean number that decode while any does
    batch = decode_s / _covered_s(_merged(cut[:, 1:])) if decode_s > 0.0 else 0.0
    share = np.divide(prefilling_s, spans[:, 1] - spans[:, 0], out=np.zeros_like(tokens), where=prefilling_s > 0.0)
    prefill_work_j = share * prefill_j(c, gpus, tokens, batch)
    if decode_s == 0.0:
        return _Works(prefill_work_j, np.zeros_like(tokens), _covered_s(stalls))

    # while a prompt is worked on, the others get one token each, not one a step of their own
    stalled_s = _covered_before(stalls, cut[:, 2]) - _covered_before(stalls, cut[:, 1])
    stalled_s = np.where(decoding_s > 0.0, stalled_s, 0.0)
    prompts_per_s = float(share.sum()) / _covered_s(stalls) if stalls else 0.0
    own_s = token_s(c, batch, tokens)
    decoded = (decoding_s - stalled_s) / own_s + stalled_s * prompts_per_s
    so_far = np.maximum(0.5 * (cut[:, 1] + cut[:, 2]) - spans[:, 1], 0.0) / own_s
    decode_work_j = np.where(decoding_s > 0.0, decoded * token_j(c, gpus, batch, tokens + so_far), 0.0)
    return _Works(prefill_work_j, decode_work_j, _covered_s(_merged([*cut[:, :2], *cut[:, 1:]])))


def _merged(spans: Iterable[Floats]) -> list[Span]:
    """The spans as stretches that do not touch, ascending."""
    merged: list[Span] = []
    for from_s, to_s in sorted((float(span[0]), float(span[1])) for span in spans if span[1] > span[0]):
        if merged and from_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], to_s)
        else:
            merged.append((from_s, to_s))
    return merged


def _covered_s(merged: Sequence[Span]) -> float:
    """Time in these stretches."""
    return sum(to_s - from_s for from_s, to_s in merged)


def _covered_before(merged: Sequence[Span], at_s: Floats) -> Floats:
    """Time in these stretches before each of these moments."""
    if not merged:
        return np.zeros_like(at_s)
    edges = np.array(merged)
    lengths = edges[:, 1] - edges[:, 0]
    covered = np.column_stack((np.cumsum(lengths) - lengths, np.cumsum(lengths)))
    before_s: Floats = np.interp(at_s, edges.ravel(), covered.ravel())
    return before_s
