"""The JSON body of a replayed request: a prompt of the wanted length, and an output of exactly the wanted length. Pure.

``ignore_eos`` and ``max_tokens`` make an engine of vLLM's kind produce exactly that many tokens.
"""

import json
from dataclasses import dataclass, field

from benchmarks.replay import ReplayRequest
from benchmarks.replay_prompt import Calibration, PromptText

CHAT_PATH = "/v1/chat/completions"
TEXT_PATH = "/v1/completions"


@dataclass(frozen=True, slots=True)
class RequestBodies:
    """Renders bodies for one model; ``chat`` tells which endpoint they are for."""

    model: str
    chat: bool = True
    calibration: Calibration = field(default_factory=Calibration)
    text: PromptText = field(default_factory=PromptText)

    @property
    def path(self) -> str:
        """Where they are to be posted."""
        return CHAT_PATH if self.chat else TEXT_PATH

    def render(self, request: ReplayRequest) -> bytes:
        """The body of one request."""
        words = self.calibration.words(request.input_tokens)
        return self.around(self.text.stretch(request.number, words), request.output_tokens)

    def around(self, prompt: bytes, output_tokens: int) -> bytes:
        """A body with this prompt, which must need no escaping in JSON."""
        opening, closing = (b'"messages":[{"role":"user","content":"', b'"}]') if self.chat else (b'"prompt":"', b'"')
        return (
            b'{"model":%b,%b%b%b,"max_tokens":%d,"ignore_eos":true,"stream":true,'
            b'"stream_options":{"include_usage":true}}'
            % (json.dumps(self.model).encode(), opening, prompt, closing, output_tokens)
        )
