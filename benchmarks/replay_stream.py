"""Reading one streamed completion: bytes in, times of tokens, token counts and errors out. Pure; knows no socket.

Each ``data:`` line is one event. The first event of any kind is the first token's mark (a chat's role chunk is sent
with it); only events that carry text are tokens. Engines merge tokens into one event under load, so how many tokens
there were is told by ``usage``.
"""

import msgspec

_DATA = b"data:"
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    energy_mj: float | None = None  # an extension: what the request cost


class _Error(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | str | None = None


_decode = msgspec.json.Decoder(_Event).decode


class StreamReader:
    """The state of one stream; ``failure`` is set as soon as it cannot end well."""

    __slots__ = ("_rest", "completion_tokens", "done", "energy_mj", "failure", "first_s", "prompt_tokens", "token_s")

    def __init__(self) -> None:
        self._rest = b""
        self.done = False
        self.failure: str | None = None
        self.first_s: float | None = None
        self.token_s: list[float] = []
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.energy_mj: float | None = None

    def feed(self, body: bytes, now_s: float) -> None:
        """Take the next piece of the body, which came at ``now_s``."""
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(_DATA):
                self._event(line[len(_DATA) :].strip(), now_s)

    def _event(self, event: bytes, now_s: float) -> None:
        if event == _DONE:
            self.done = True
            return
        try:
            read = _decode(event)
        except msgspec.DecodeError as error:
            self.failure = self.failure or f"unreadable event: {error}"
            return
        if read.error is not None:
            self.failure = self.failure or f"error in the stream: {error_reason(read.error)}"
            return
        if self.first_s is None:
            self.first_s = now_s
        if any(_has_text(choice) for choice in read.choices):
            self.token_s.append(now_s)
        if read.usage is not None:
            self.prompt_tokens = read.usage.prompt_tokens
            self.completion_tokens = read.usage.completion_tokens
            self.energy_mj = read.usage.energy_mj


def _has_text(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    return bool(delta.content or delta.reasoning_content or delta.reasoning)


def error_reason(error: _Error | str) -> str:
    """An error as a short reason, so that alike ones are counted together."""
    if isinstance(error, str):
        return error
    return f"{error.code} {error.message}".strip() if error.code is not None else error.message


def status_reason(status: int, body: bytes, dropped_reason: str | None) -> str:
    """Why an answer with an error status came, as short and as countable as can be."""
    if dropped_reason is not None:
        return f"HTTP {status} {dropped_reason}"
    try:
        error = _decode(body).error
    except msgspec.DecodeError:
        error = None
    message = error if isinstance(error, str) else error.message if error is not None else ""
    return f"HTTP {status} {message[:120]}".rstrip()
