"""The contract of length prediction: what is known of a request before its first token, and what is foretold of it.

Values and a protocol. What is learned lives in ``pools.learned_lengths``; the costs of a wrong guess in
``pools.length_costs``.
"""

from typing import NamedTuple, Protocol


class LengthFeatures(NamedTuple):
    """What is known of an answer before it begins."""

    model: str
    input_tokens: int
    cap_tokens: int | None = None  # max_tokens, max_completion_tokens
    hint_tokens: int | None = None  # nvext.agent_hints.osl
    tools: bool = False
    structured: bool = False  # a response_format
    thinking: bool = False
    tenant: str = "default-flow"
    tier: str | None = None
    tool_choice: int = 0  # checksum of what was said; 0 = nothing
    system: int = 0  # checksum of the system prompt; 0 = none
    turn: bytes = b""  # of the last user turn: its opening, NUL, its ending; any bytes


class PredictedLength(NamedTuple):
    """Output tokens: finite, >= 0, at most the request's cap and what the model's context leaves."""

    tokens: float  # to plan with; its output size is the one that costs least in expectation
    low_tokens: float
    """One answer in ten is shorter than this, one in ten longer than ``high_tokens``."""
    median_tokens: float
    high_tokens: float


class LengthPredictor(Protocol):
    """Predicts output tokens, and learns from answers that ended."""

    def predict(self, features: LengthFeatures) -> PredictedLength:
        """What to expect of a request."""

    def plan(self, features: LengthFeatures) -> float:
        """The tokens to plan with, and nothing else: ``predict(features).tokens``."""

    def learn(self, features: LengthFeatures, output_tokens: int) -> None:
        """Take in an answer of ``output_tokens`` tokens that ended by itself or at its cap."""
