"""Input tokens: an estimate from the size of a prompt, learned online, with the bound of its error.

tokens = a x bytes of text + b x messages + c, for each model, learned from the ``usage.prompt_tokens`` of its answers
by a Kalman filter on the relative error (what is estimated must be right in proportion, not in tokens). A running
quantile of the error, for each size of input, gives the bounds. Where both bounds lie in one class the estimate
decides; where they do not it is ``undecided``, and only then exact counting (pools/exact_tokens.py) is worth its
time.

Pure: reads no text, only sizes; saved and restored as a plain dict.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from pools.classes import ClassCuts

Messages = list[tuple[str, str]]  # (role, text)


class PromptSize(msgspec.Struct, frozen=True, gc=False):
    """How much prompt there is."""

    text_bytes: int  # of all its text, as UTF-8 JSON
    messages: int = 0  # of a chat; 0 for a plain completion


class TokenEstimate(msgspec.Struct, frozen=True, gc=False):
    """Input tokens, and the bounds between which 95 % of the true counts lie."""

    tokens: int
    low: int
    high: int

    def decides(self, cuts: ClassCuts) -> bool:
        """Whether both bounds lie in one size of input, and on one side of the longest input an SLO is fixed for."""
        low, high = self.low, self.high
        first, second = cuts.input_tokens
        longest = cuts.longest_input_tokens
        return high < first or (low >= first and high < second) or (low >= second and high <= longest) or low > longest


class TokenCount(msgspec.Struct, frozen=True, gc=False):
    """What was counted: exactly, or estimated; ``undecided`` if the truth may lie in another class."""

    tokens: int
    exact: bool
    undecided: bool


class ExactTokens(Protocol):
    """Counts the tokens of text as the engine will."""

    def of_text(self, text: str) -> int:
        """Tokens of a plain prompt, with what the engine adds to it."""

    def of_chat(self, messages: Messages) -> int:
        """Tokens of a conversation, with those of its template."""


PRIOR = (0.25, 4.0, 3.0)  # tokens a byte of English text, a message, a request: what common chat models need
PRIOR_SPREAD = (0.12, 4.0, 8.0)  # how unsure that is
DRIFT = 1e-3  # share of the prior's variance by which it may change from one request to the next
NOISE = 0.1  # relative error of a good estimate
MOST_A, MOST_B, MOST_C = (spread * spread for spread in PRIOR_SPREAD)  # it is never less sure than at first
OUTLIER = 0.5  # relative error beyond which a request (an image, say) teaches no more
COVERED = 0.95


class _Line:
    """One model's a, b, c: a Kalman filter. Written out: it runs once a request."""

    __slots__ = ("covariance", "theta")

    def __init__(self) -> None:
        self.theta = PRIOR
        a, b, c = PRIOR_SPREAD
        self.covariance = (a * a, 0.0, 0.0, b * b, 0.0, c * c)  # upper triangle: aa ab ac bb bc cc

    def learn(self, size: PromptSize, tokens: int) -> None:
        """Take in a true count; what it explains badly beyond ``OUTLIER`` moves the line no further."""
        a, b, c = self.theta
        aa, ab, ac, bb, bc, cc = self.covariance
        x, y, z = size.text_bytes / tokens, size.messages / tokens, 1.0 / tokens
        error = 1.0 - (a * x + b * y + c * z)
        error = max(-OUTLIER, min(OUTLIER, error))
        aa = min(aa + DRIFT * MOST_A, MOST_A)
        bb = min(bb + DRIFT * MOST_B, MOST_B)
        cc = min(cc + DRIFT * MOST_C, MOST_C)
        pa, pb, pc = aa * x + ab * y + ac * z, ab * x + bb * y + bc * z, ac * x + bc * y + cc * z
        scale = 1.0 / (x * pa + y * pb + z * pc + NOISE * NOISE)
        step = scale * error
        self.theta = (max(a + pa * step, 0.01), b + pb * step, c + pc * step)
        pa_scaled, pb_scaled = pa * scale, pb * scale
        self.covariance = (
            aa - pa_scaled * pa,
            ab - pa_scaled * pb,
            ac - pa_scaled * pc,
            bb - pb_scaled * pb,
            bc - pb_scaled * pc,
            cc - pc * scale * pc,
        )


class _Bound:
    """The relative error that 95 % stay under: a quantile followed step by step."""

    __slots__ = ("count", "factor", "log_error", "sum_error")

    def __init__(self) -> None:
        self.follow(0.5, 0.0, 0)

    def follow(self, log_error: float, sum_error: float, count: int) -> None:
        """Stand at |log(true / estimated)| = ``log_error`` after ``count`` errors of this sum."""
        self.log_error, self.sum_error, self.count = log_error, sum_error, count
        self.factor = math.exp(log_error)

    def learn(self, log_error: float) -> None:
        """Take in an error."""
        count = self.count + 1
        pace = 0.1 + 50.0 / (50.0 + count)
        step = COVERED if log_error > self.log_error else COVERED - 1.0
        bound = max(1e-3, min(2.0, self.log_error * math.exp(pace * step)))
        self.follow(bound, self.sum_error + math.expm1(log_error), count)


@dataclass(frozen=True, slots=True)
class EstimateError:
    """How well a model's prompts of one size of input were estimated; relative errors."""

    input_size: int  # 0, 1, 2: short, medium, long
    count: int
    mean: float
    p95: float


class TokenEstimator:
    """Estimates for every model seen."""

    def __init__(self, cuts: ClassCuts | None = None) -> None:
        self.cuts = cuts or ClassCuts()
        self._lines: dict[str, _Line] = {}
        self._bounds: dict[str, tuple[_Bound, _Bound, _Bound]] = {}

    def estimate(self, model: str, size: PromptSize) -> TokenEstimate:
        """Tokens of a prompt of this size; at least 1."""
        line = self._lines.get(model) or self._know(model)
        a, b, c = line.theta
        tokens = a * size.text_bytes + b * size.messages + c
        if tokens < 1.0:
            tokens = 1.0
        factor = self._bounds[model][self._input_size(tokens)].factor
        return TokenEstimate(round(tokens), int(tokens / factor), math.ceil(tokens * factor))

    def learn(self, model: str, size: PromptSize, prompt_tokens: int) -> None:
        """Take in what the engine counted."""
        if prompt_tokens < 1:
            return
        line = self._lines.get(model) or self._know(model)
        a, b, c = line.theta
        tokens = max(a * size.text_bytes + b * size.messages + c, 1.0)
        self._bounds[model][self._input_size(tokens)].learn(abs(math.log(prompt_tokens / tokens)))
        line.learn(size, prompt_tokens)

    def errors(self, model: str) -> tuple[EstimateError, ...]:
        """How well it did, by size of input; sizes not seen are left out."""
        bounds = self._bounds.get(model, ())
        return tuple(
            EstimateError(k, b.count, b.sum_error / b.count, math.expm1(b.log_error))
            for k, b in enumerate(bounds)
            if b.count
        )

    def snapshot(self) -> dict[str, Any]:
        """All it has learned, as plain lists and numbers."""
        return {
            "version": 1,
            "models": {
                model: {
                    "theta": list(line.theta),
                    "covariance": list(line.covariance),
                    "bounds": [[b.log_error, b.sum_error, b.count] for b in self._bounds[model]],
                }
                for model, line in self._lines.items()
            },
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take over a snapshot. Raises ``ValueError`` if it is not one."""
        if snapshot.get("version") != 1:
            raise ValueError("token snapshot: not of version 1; delete it to start anew")
        other = TokenEstimator(self.cuts)
        for model, known in snapshot["models"].items():
            numbers = [*known["theta"], *known["covariance"]]
            if len(numbers) != 9 or not all(math.isfinite(v) for v in numbers) or len(known["bounds"]) != 3:
                raise ValueError(f"token snapshot: numbers of {model} are missing or not finite; delete the snapshot")
            line = other._know(model)
            line.theta, line.covariance = tuple(known["theta"]), tuple(known["covariance"])
            for bound, values in zip(other._bounds[model], known["bounds"], strict=True):
                bound.follow(*values)
        self._lines, self._bounds = other._lines, other._bounds

    def _know(self, model: str) -> _Line:
        self._bounds[model] = (_Bound(), _Bound(), _Bound())
        line = self._lines[model] = _Line()
        return line

    def _input_size(self, tokens: float) -> int:
        first, second = self.cuts.input_tokens
        return (tokens >= first) + (tokens >= second)


class InputCounter:
    """Counts a prompt: by estimate while that decides, else exactly where the model's tokenizer is at hand."""

    def __init__(self, estimator: TokenEstimator, exact: Mapping[str, ExactTokens]) -> None:
        self.estimator = estimator
        self._exact = exact

    def count(self, model: str, size: PromptSize, read: Callable[[], str | Messages] | None = None) -> TokenCount:
        """The tokens of a prompt. ``read`` gives its text, and is called only if that is needed."""
        estimate = self.estimator.estimate(model, size)
        if estimate.decides(self.estimator.cuts):
            return TokenCount(estimate.tokens, exact=False, undecided=False)
        exact = self._exact.get(model)
        if exact is None or read is None:
            return TokenCount(estimate.tokens, exact=False, undecided=True)
        prompt = read()
        tokens = exact.of_text(prompt) if isinstance(prompt, str) else exact.of_chat(prompt)
        return TokenCount(tokens, exact=True, undecided=False)
