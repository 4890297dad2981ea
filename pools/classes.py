"""RequestClass and Slo: the nine kinds of request, and the latency each is promised.

The paper's request types: input length {S, M, L} x output length {S, M, L}, first letter = input.
Cuts are the 33rd and 66th percentile of the Azure Conversation trace (DynamoLLM section III).
"""

from dataclasses import dataclass, field
from enum import IntEnum


class RequestClass(IntEnum):
    """One of nine kinds of request, SS .. LL; the value is 3 x input size + output size."""

    SS = 0
    SM = 1
    SL = 2
    MS = 3
    MM = 4
    ML = 5
    LS = 6
    LM = 7
    LL = 8

    @property
    def input_size(self) -> int:
        """0, 1, 2 for a short, medium, long input."""
        return self.value // 3

    @property
    def output_size(self) -> int:
        """0, 1, 2 for a short, medium, long output."""
        return self.value % 3

    def dominates(self, other: "RequestClass") -> bool:
        """Whether a pool kept for this class can serve ``other``: at least as long in BOTH dimensions."""
        return self.input_size >= other.input_size and self.output_size >= other.output_size

    @staticmethod
    def of_sizes(input_size: int, output_size: int) -> "RequestClass":
        """The class of two sizes in 0..2."""
        return RequestClass(3 * input_size + output_size)


REQUEST_CLASSES: tuple[RequestClass, ...] = tuple(RequestClass)


@dataclass(frozen=True, slots=True)
class Slo:
    """Latency promised at P99: time to first token and time between tokens, in seconds."""

    ttft_s: float
    tbt_s: float

    def stricter(self, other: "Slo") -> "Slo":
        """The tighter of both in each dimension."""
        return Slo(min(self.ttft_s, other.ttft_s), min(self.tbt_s, other.tbt_s))


@dataclass(frozen=True, slots=True)
class ClassCuts:
    """Where the nine classes part, in tokens (upper bounds, exclusive), and the longest input the SLO holds for."""

    input_tokens: tuple[int, int] = (256, 1024)
    output_tokens: tuple[int, int] = (100, 350)
    longest_input_tokens: int = 8192

    def classify(self, input_tokens: int, output_tokens: float) -> RequestClass:
        """The class of a request with this many input and (predicted) output tokens."""
        first, second = self.input_tokens
        input_size = (input_tokens >= first) + (input_tokens >= second)
        first, second = self.output_tokens
        output_size = (output_tokens >= first) + (output_tokens >= second)
        return REQUEST_CLASSES[3 * input_size + output_size]


@dataclass(frozen=True, slots=True)
class ClassSlos:
    """The SLO of each class: TTFT by input size, one TBT (DynamoLLM table of SLOs, P99)."""

    ttft_s: tuple[float, float, float] = (0.25, 0.4, 2.0)
    tbt_s: float = 0.1
    cuts: ClassCuts = field(default_factory=ClassCuts)

    def slo(self, request_class: RequestClass, input_tokens: int = 0) -> Slo:
        """The SLO of a class; beyond the longest input the paper covers, TTFT scales with the input's length."""
        ttft_s = self.ttft_s[request_class.input_size]
        longest = self.cuts.longest_input_tokens
        if input_tokens > longest:
            ttft_s *= input_tokens / longest
        return Slo(ttft_s, self.tbt_s)
