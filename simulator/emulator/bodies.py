"""Request bodies: what vLLM 0.32 accepts and refuses, as plain data in and ``Generation`` or ``ApiError`` out.

Types are checked by pydantic (vLLM's own checker, hence the same words), values in the order and with the messages
observed. Unknown fields pass. Logprobs, tools and structured output are not emulated: accepted, without effect.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from simulator.emulator.errors import ApiError, bad_request
from simulator.emulator.text import OutputLengths, Tokenizer, Words, output_seed
from simulator.emulator.validation import listed, shown, validated

COMPLETION_DEFAULT_TOKENS = 16
MAX_CHOICES = 16_384
EMPTY_PROMPT = "Either prompt or prompt_embeds must be provided and non-empty."
TokenId = Annotated[int, Field(ge=0)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    """What a stream says besides its text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class _Sampling(_Body):
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    seed: int | None = None
    priority: int = 0


class ContentPart(_Body):
    """A piece of a message; only text counts here."""

    type: str = "text"
    text: str = ""


class Message(_Body):
    """One turn of a conversation."""

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None

    def text(self) -> str:
        """Its parts together."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = 0


class CompletionBody(_Sampling):
    """POST /v1/completions."""

    prompt: list[TokenId] | list[list[TokenId]] | str | list[str] | None = None
    echo: bool | None = False
    suffix: str | None = None


class TokenizeBody(_Body):
    """POST /tokenize: of a prompt, or of a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = False


class DetokenizeBody(_Body):
    """POST /detokenize."""

    tokens: list[TokenId]


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to generate: exactly ``output_tokens`` tokens of ``words``."""

    input_tokens: int
    output_tokens: int
    words: Words
    finish_reason: Literal["stop", "length"]
    stop_reason: str | None = None  # the stop string that ended it
    text_characters: int | None = None  # where a stop string cuts the text
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Generation:
    """A valid request: its sequences, in order of their index, and how to answer."""

    choices: tuple[Choice, ...]
    chat: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    prompt_tokens: int  # of all prompts, as usage counts them
    priority: int  # higher is more important (the body's, negated)
    max_tokens: int
    vocabulary_error: ApiError | None = None  # found only after a stream has begun


@dataclass(frozen=True, slots=True)
class BodyRules:
    """What the instance was started with, as far as requests are checked against it."""

    model: str
    max_model_len: int
    tokenizer: Tokenizer
    lengths: OutputLengths
    by_priority: bool = False
    seed: int = 0


def parse_chat(decoded: Any, rules: BodyRules) -> Generation:
    """A chat request. Raises ``ApiError``."""
    body = validated(ChatBody, decoded)
    _check_model(body, rules)
    _check_stream_options(body)
    if not body.messages:
        raise bad_request("Cannot apply chat template to an empty conversation. Provide at least one message.")
    messages = [(message.role, message.text()) for message in body.messages]
    for index, message in enumerate(body.messages):
        if message.content is None and message.tool_calls is None and message.role != "assistant":
            line = {
                "type": "string_type",
                "loc": f"body.messages.{index}.content",
                "msg": "Input should be a valid string",
                "input": "None",
            }
            raise listed([f"  {line}"], f"body.messages.{index}.content")
    if body.top_logprobs and not body.logprobs:
        raise bad_request("when using `top_logprobs`, `logprobs` must be set to true.", "top_logprobs")
    input_tokens = rules.tokenizer.count_chat(messages)
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    key = "\n".join(content for _, content in messages).encode()
    return _generation(body, rules, [(input_tokens, key, "")], asked, rules.max_model_len, chat=True, exact=False)


def parse_completion(decoded: Any, rules: BodyRules) -> Generation:
    """A text completion request of one prompt or several. Raises ``ApiError``."""
    body = validated(CompletionBody, decoded)
    _check_model(body, rules)
    _check_stream_options(body)
    if body.suffix is not None:
        raise ApiError(
            400, "BadRequestError", "suffix is only supported for models with FIM completion rendering", "suffix"
        )
    prompts = body.prompt
    if prompts is None or prompts == "":
        raise bad_request(EMPTY_PROMPT, "prompt")
    if prompts == []:
        raise bad_request("You must pass at least one prompt")
    several: list[Any] = prompts if isinstance(prompts, list) and not isinstance(prompts[0], int) else [prompts]
    sized = []
    outside: int | None = None
    for prompt in several:
        if isinstance(prompt, str):
            sized.append((rules.tokenizer.count(prompt), prompt.encode(), prompt if body.echo else ""))
        else:
            outside = next((i for i in prompt if i >= rules.tokenizer.vocabulary), outside)
            echo = rules.tokenizer.decode(prompt) if body.echo else ""
            sized.append((len(prompt), json.dumps(prompt).encode(), echo))
    exact = not isinstance(several[0], str)
    generation = _generation(
        body, rules, sized, body.max_tokens, COMPLETION_DEFAULT_TOKENS, chat=False, exact=exact, outside=outside
    )
    if generation.vocabulary_error is not None and not generation.stream:
        raise generation.vocabulary_error
    return generation


def _check_model(body: _Sampling, rules: BodyRules) -> None:
    if body.model and body.model != rules.model:
        message = f"The model `{body.model}` does not exist. Valid aliases: {rules.model}."
        raise ApiError(404, "NotFoundError", message, "model")


def _check_stream_options(body: _Sampling) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")


def _check_sampling(body: _Sampling, max_tokens: int, max_model_len: int) -> None:
    if max_tokens < 1:
        raise bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens", max_tokens)
    if max_tokens > max_model_len:
        message = f"max_tokens={max_tokens} cannot be greater than max_model_len={max_model_len}."
        raise bad_request(message + " Please request fewer output tokens.", "max_tokens", max_tokens)
    for name, value in (("presence_penalty", body.presence_penalty), ("frequency_penalty", body.frequency_penalty)):
        if value is not None and not -2 <= value <= 2:
            raise bad_request(f"{name} must be in [-2, 2], got {value}.")
    if body.temperature is not None and body.temperature < 0:
        message = f"temperature must be non-negative, got {body.temperature}."
        raise bad_request(message, "temperature", body.temperature)
    if body.temperature is not None and body.temperature > 2:
        raise bad_request(f"temperature must be in [0, 2], got {body.temperature}.", "temperature", body.temperature)
    if body.top_p is not None and not 0 < body.top_p <= 1:
        raise bad_request(f"top_p must be in (0, 1], got {body.top_p}.", "top_p", body.top_p)
    if body.top_k is not None and body.top_k < -1:
        raise bad_request(f"top_k must be 0 (disable), or at least 1, got {body.top_k}.")
    _check_choices(body, max_tokens)


def _check_choices(body: _Sampling, max_tokens: int) -> None:
    n = 1 if body.n is None else body.n
    if n < 1:
        raise bad_request(f"n must be at least 1, got {n}.")
    if n > MAX_CHOICES:
        advice = "To increase this limit, set the VLLM_MAX_N_SEQUENCES environment variable."
        raise bad_request(f"n must be at most {MAX_CHOICES}, got {n}. {advice}")
    if body.min_tokens < 0:
        raise bad_request(f"min_tokens must be greater than or equal to 0, got {body.min_tokens}.")
    if body.min_tokens > max_tokens:
        raise bad_request(f"min_tokens must be less than or equal to max_tokens={max_tokens}, got {body.min_tokens}.")
    if body.stop == "" or (isinstance(body.stop, list) and "" in body.stop):
        raise bad_request("stop cannot contain an empty string.")


def _check_length(input_tokens: int, max_model_len: int, exact: bool) -> None:
    if input_tokens < max_model_len:
        return
    count = input_tokens if exact else max_model_len + 1
    message = (
        f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
        f"{'' if exact else 'at least '}{count} input tokens, which exceeds this limit even without any output tokens. "
        "Please reduce the length of the input prompt."
    )
    raise bad_request(message, "input_tokens", count)


def _generation(
    body: _Sampling,
    rules: BodyRules,
    prompts: list[tuple[int, bytes, str]],
    asked: int | None,
    default_tokens: int,
    *,
    chat: bool,
    exact: bool,
    outside: int | None = None,
) -> Generation:
    for input_tokens, _, _ in prompts:
        if input_tokens < 1:
            raise bad_request(EMPTY_PROMPT, "prompt")
        _check_length(input_tokens, rules.max_model_len, exact)
    longest = max(input_tokens for input_tokens, _, _ in prompts)
    max_tokens = min(default_tokens, rules.max_model_len - longest) if asked is None else asked
    _check_sampling(body, max_tokens, rules.max_model_len)
    if body.priority != 0 and not rules.by_priority:
        message = "priority other than 0 needs an engine started with --scheduling-policy priority."
        raise bad_request(message, "priority", body.priority)
    options = body.stream_options or StreamOptions()
    choices = tuple(
        _choice(body, rules, prompt, min(max_tokens, rules.max_model_len - prompt[0]), number)
        for prompt in prompts
        for number in range(body.n or 1)
    )
    return Generation(
        choices=choices,
        chat=chat,
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        prompt_tokens=sum(input_tokens for input_tokens, _, _ in prompts),
        priority=-body.priority,
        max_tokens=max_tokens,
        vocabulary_error=None if outside is None else bad_request(f"Token id {outside} is out of vocabulary"),
    )


def _choice(body: _Sampling, rules: BodyRules, prompt: tuple[int, bytes, str], limit: int, number: int) -> Choice:
    """How long one sequence gets and why it ends: by itself, at its limit, or at a stop string."""
    input_tokens, key, echo = prompt
    seed = output_seed(key, rules.seed if body.seed is None else body.seed, number)
    words = Words(seed)
    natural = max(rules.lengths.tokens(seed), body.min_tokens, 1)
    output_tokens = limit if body.ignore_eos else min(natural, limit)
    by_itself = not body.ignore_eos and natural <= limit
    stops = [body.stop] if isinstance(body.stop, str) else (body.stop or [])
    if stops:
        found = _find_stop(words, output_tokens - by_itself, body.min_tokens, stops)
        if found is not None:
            tokens, characters, stop = found
            return Choice(input_tokens, tokens, words, "stop", stop, characters, echo)
    return Choice(input_tokens, output_tokens, words, "stop" if by_itself else "length", echo=echo)


def _find_stop(words: Words, tokens: int, min_tokens: int, stops: list[str]) -> tuple[int, int, str] | None:
    """(tokens until the first stop string is complete, characters before it, the string); None if it never comes."""
    text = ""
    for i in range(tokens):
        begin = max(0, len(text) - max(len(stop) for stop in stops))
        text += words.at(i)
        if i + 1 < min_tokens:
            continue
        for stop in stops:
            at = text.find(stop, begin)
            if at >= 0:
                return i + 1, at, stop
    return None


def parse_tokenize(decoded: Any, rules: BodyRules) -> dict[str, Any]:
    """The answer to /tokenize. Raises ``ApiError``."""
    body = validated(TokenizeBody, decoded)
    if body.prompt is None and body.messages is None:
        fields = "prompt", "messages"
        given = shown(decoded)
        lines = [{"type": "missing", "loc": f"body.{f}", "msg": "Field required", "input": given} for f in fields]
        raise listed([f"  {line}" for line in lines], "body.prompt")
    tokenizer = rules.tokenizer
    if body.prompt is None:
        ids = tokenizer.encode_chat([(message.role, message.text()) for message in body.messages or []])
    else:
        ids = tokenizer.encode(body.prompt)
    strings = [tokenizer.decode([i]) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": rules.max_model_len, "tokens": ids, "token_strs": strings}


def parse_detokenize(decoded: Any, rules: BodyRules) -> dict[str, Any]:
    """The answer to /detokenize. Raises ``ApiError``."""
    body = validated(DetokenizeBody, decoded)
    outside = next((i for i in body.tokens if i >= rules.tokenizer.vocabulary), None)
    if outside is not None:
        raise bad_request(f"Token id {outside} is out of vocabulary")
    return {"prompt": rules.tokenizer.decode(body.tokens)}
