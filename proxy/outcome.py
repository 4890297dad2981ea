"""Outcome: how one request ended. What metrics count, predictors learn from and accounting books."""

import msgspec

from pools.request import Request
from proxy.fields import RequestFields


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """How one request ended. Tokens are None where the engine did not say."""

    request: Request
    fields: RequestFields
    status: int
    instance_id: str | None
    pool: str | None
    ended_s: float
    first_token_s: float | None  # when it came; of an answer that is no stream, when it ended
    prompt_tokens: int | None
    completion_tokens: int | None
    cancelled: bool
    streamed: bool = False  # the instance answered with a stream
