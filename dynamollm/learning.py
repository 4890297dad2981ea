"""What the gateway asks before the first token, answered by what it has learned from requests that ended.

Joins the gateway's fields and outcomes to the predictors of ``pools``, which know nothing of HTTP.
"""

from pools.lengths import LengthFeatures, LengthPredictor
from pools.tokens import TokenEstimator
from proxy.fields import RequestFields
from proxy.outcome import Outcome


class GatewayLengths:
    """The gateway's length predictor; give ``learn`` to it as an observer."""

    def __init__(self, predictor: LengthPredictor) -> None:
        self._predictor = predictor

    def output_tokens(self, fields: RequestFields, model: str, input_tokens: int, tenant: str) -> float:
        """Tokens of the answer to plan with."""
        return self._predictor.plan(_features(fields, model, input_tokens, tenant))

    def learn(self, outcome: Outcome) -> None:
        """Take in an answer that ended by itself; one cut short says nothing of its length."""
        if outcome.completion_tokens is not None and not outcome.cancelled and outcome.status < 400:
            request = outcome.request
            features = _features(outcome.fields, request.model, request.input_tokens, request.tenant)
            self._predictor.learn(features, outcome.completion_tokens // max(outcome.fields.choices, 1))


class GatewayTokens:
    """What teaches the gateway's token estimates; give ``learn`` to it as an observer."""

    def __init__(self, estimator: TokenEstimator) -> None:
        self._estimator = estimator

    def learn(self, outcome: Outcome) -> None:
        """Take in what the engine counted; a prompt that came as token ids teaches nothing."""
        if outcome.prompt_tokens is not None and outcome.fields.input_tokens is None:
            self._estimator.learn(outcome.request.model, outcome.fields.size, outcome.prompt_tokens)


def _features(fields: RequestFields, model: str, input_tokens: int, tenant: str) -> LengthFeatures:
    return LengthFeatures(
        model,
        input_tokens,
        fields.cap_tokens,
        fields.hint_tokens,
        fields.tools,
        fields.structured,
        fields.thinking,
        tenant,
        fields.service_tier,
        fields.tool_choice,
        fields.system,
        fields.turn,
    )
