"""Who an interval's joules belong to: pure, one interval of one instance and the requests on it at a time.

The requests on the instance share what it drew in proportion to their token work in that time: prefill spread over the
time just before the first token, decoding over the time after it in which no prompt is worked on (all sequences of a
batch advance together, and wait for a prompt together). Time in which none was at work is idle time, at the idle power
of the profile, and never more than the meter says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from energy.accounting import Interval, User
from energy.accounting_work import prefill_j, prefill_s, token_j, token_s
from energy.profile import StepCoefficients

Span = tuple[float, float]  # from, to


@dataclass(slots=True)
class Serving:
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
        alone_s = prefill_s(c, self.input_tokens)
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


def attribute(interval: Interval, servings: Iterable[Serving]) -> Attribution:
    """Share an interval's energy among these requests. The parts and the rest sum to it exactly (to rounding)."""
    c = interval.instance.coefficients
    if c is None:
        return Attribution((), interval.energy_j, None)
    works, spans = _works(interval, c, list(servings))
    total_j = sum(prefill_work_j + decode_work_j for _, prefill_work_j, decode_work_j in works)
    if total_j <= 0.0:
        return Attribution((), interval.energy_j, None)
    idle_s = (interval.end_s - interval.begin_s) - _covered_s(spans)
    idle_j = min(interval.energy_j, idle_s * interval.instance.idle_w * interval.instance.gpus)
    scale = (interval.energy_j - idle_j) / total_j
    parts = tuple(Part(s, prefill * scale, decode * scale) for s, prefill, decode in works)
    return Attribution(parts, idle_j, scale)


def _works(
    interval: Interval, c: StepCoefficients, servings: Sequence[Serving]
) -> tuple[list[tuple[Serving, float, float]], list[Span]]:
    """Expected joules of each request in the interval, prefill and decode, and the stretches of time they took."""
    gpus, here = interval.instance.gpus, (interval.begin_s, interval.end_s)
    known = [(s, s.spans(c)) for s in servings]
    decoded = [_overlap(decode, here) for _, (_, decode) in known]
    worked = [_overlap(prefill, here) for _, (prefill, _) in known]
    stalls = _merged(worked)
    prompts = sum(
        _length_s(part) / _length_s(prefill)
        for part, (_, (prefill, _)) in zip(worked, known, strict=True)
        if _length_s(part) > 0.0
    )
    prompts_per_s = prompts / sum(map(_length_s, stalls)) if stalls else 0.0  # of stalled time: a token each
    decode_s = sum(map(_length_s, decoded))
    # mean number that decode while any does
    batch = decode_s / _covered_s(decoded) if decode_s else 1.0
    works = []
    for (s, (prefill, decode)), prefilling, decoding in zip(known, worked, decoded, strict=True):
        prefill_work_j = decode_work_j = 0.0
        if (here_s := _length_s(prefilling)) > 0.0:
            prefill_work_j = (
                here_s / _length_s(prefill) * prefill_j(c, gpus, s.input_tokens, batch if decode_s else 0.0)
            )
        if _length_s(decoding) > 0.0:
            stalled_s = sum(_length_s(_overlap(decoding, stall)) for stall in stalls)
            tokens = (_length_s(decoding) - stalled_s) / token_s(c, batch, s.input_tokens) + stalled_s * prompts_per_s
            so_far = (0.5 * (decoding[0] + decoding[1]) - decode[0]) / token_s(c, batch, s.input_tokens)
            decode_work_j = tokens * token_j(c, gpus, batch, s.input_tokens + so_far)
        if prefill_work_j or decode_work_j:
            works.append((s, prefill_work_j, decode_work_j))
    return works, [*worked, *decoded]


def _overlap(span: Span, within: Span) -> Span:
    from_s = min(max(span[0], within[0]), within[1])
    return from_s, max(from_s, min(span[1], within[1]))


def _length_s(span: Span) -> float:
    return span[1] - span[0]


def _merged(spans: Iterable[Span]) -> list[Span]:
    """The spans as stretches that do not touch."""
    merged: list[Span] = []
    for from_s, to_s in sorted(span for span in spans if span[1] > span[0]):
        if merged and from_s <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], to_s)
        else:
            merged.append((from_s, to_s))
    return merged


def _covered_s(spans: Iterable[Span]) -> float:
    """Time covered by at least one of the spans."""
    return sum(map(_length_s, _merged(spans)))
