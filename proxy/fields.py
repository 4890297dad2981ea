"""RequestFields: the few body fields the gateway reads; every other one passes through unread.

Decoding skips what is not named here, so text is measured (``len`` of its JSON) but never copied. Types are as lax as
vLLM's: a number may come as a string. What is wrong here would be wrong there: 400, with the field's path.

``rewritten`` changes top-level fields and leaves the bytes of all others as they came.
"""

import re
from binascii import crc32
from typing import Any

import msgspec
from msgspec import Raw

from pools.tokens import Messages, PromptSize
from proxy.errors import bad_request

CHAT_PATH = b"/v1/chat/completions"
COMPLETION_PATH = b"/v1/completions"

_ABSENT = Raw(b"")
_NULL = Raw(b"null")
_Number = int | float | str | bool | None
_BRACKET = ord("[")
_USER, _SYSTEM, _DEVELOPER = Raw(b'"user"'), Raw(b'"system"'), Raw(b'"developer"')
OPENING_BYTES, ENDING_BYTES = 128, 64
"""What is kept of the last user turn, so that no prompt makes length prediction dearer."""
_TURNS_BACK = 8  # messages looked through for the user's last; those after it are tool calls and their results
_SYSTEM_BYTES = 1024  # of a system prompt, to know it again by
_PATH = re.compile(r" - at `\$(.*)`$")
_BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


class _Message(msgspec.Struct):
    role: Raw = _ABSENT
    content: Raw = _ABSENT
    tool_calls: Raw = _ABSENT


class _Part(msgspec.Struct):
    text: Raw = _ABSENT


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    include_energy: bool | None = None  # ours: the usage event says what the request took


class _AgentHints(msgspec.Struct):
    osl: _Number = None


class _NvExt(msgspec.Struct):
    agent_hints: _AgentHints | None = None


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | int | str | None = None
    max_tokens: _Number = None
    n: _Number = None
    priority: _Number = None
    service_tier: str | None = None
    stream_options: _StreamOptions | None = None
    nvext: Raw = _ABSENT
    tools: Raw = _ABSENT
    tool_choice: Raw = _ABSENT
    response_format: Raw = _ABSENT
    chat_template_kwargs: Raw = _ABSENT
    reasoning_effort: Raw = _ABSENT


class _ChatBody(_Body):
    messages: list[_Message] = []
    max_completion_tokens: _Number = None


class _CompletionBody(_Body):
    prompt: Raw = _ABSENT


class RequestFields(msgspec.Struct, frozen=True):
    """What the gateway knows of a body.

    ``size`` measures all prompt text as JSON; ``input_tokens`` is known only where the prompt came as token ids.
    """

    model: str | None
    stream: bool
    include_usage: bool
    size: PromptSize
    input_tokens: int | None
    cap_tokens: int | None  # max_tokens or max_completion_tokens
    hint_tokens: int | None  # nvext.agent_hints.osl
    choices: int  # n
    tools: bool
    structured: bool
    thinking: bool
    engine_priority: int | None  # vLLM's: lower is earlier
    service_tier: str | None
    tool_choice: int = 0  # checksum; 0 = not said
    system: int = 0  # checksum of the system prompt; 0 = none
    turn: bytes = b""  # of the last user turn as JSON: its opening, NUL, its ending
    include_energy: bool = False  # in the usage event


_chat = msgspec.json.Decoder(_ChatBody)
_completion = msgspec.json.Decoder(_CompletionBody)
_parts = msgspec.json.Decoder(list[_Part])
_nvext = msgspec.json.Decoder(_NvExt)
_texts = msgspec.json.Decoder(str | list[Any])
_prompts = msgspec.json.Decoder(list[Any])
_members = msgspec.json.Decoder(dict[str, Raw])
_encode = msgspec.json.Encoder().encode


def read_chat(body: bytes) -> RequestFields:
    """The fields of a chat completion request. Raises ``ApiError`` 400."""
    fields = _decoded(_chat, body)
    messages = fields.messages
    text_bytes = len(fields.tools)
    for message in messages:
        content = message.content
        if content is not _ABSENT and memoryview(content)[0] == _BRACKET:
            text_bytes += _parts_bytes(content)
        else:
            text_bytes += len(content)
        if message.tool_calls is not _ABSENT:
            text_bytes += len(message.tool_calls)
    system = _system_of(messages[0]) if messages else 0
    return _fields(fields, PromptSize(text_bytes, len(messages)), None, system, _last_turn(messages))


def read_completion(body: bytes) -> RequestFields:
    """The fields of a text completion request. Raises ``ApiError`` 400."""
    fields = _decoded(_completion, body)
    prompt = fields.prompt
    if not len(prompt) or memoryview(prompt)[0] != _BRACKET:
        return _fields(fields, PromptSize(len(prompt)), None, 0, _ends_of(prompt))
    items: list[Any] = _decoded(_prompts, prompt)
    if items and isinstance(items[0], int):
        return _fields(fields, PromptSize(0), len(items))
    if items and isinstance(items[0], list):
        tokens = sum(len(item) for item in items if isinstance(item, list))
        return _fields(fields, PromptSize(0), tokens)
    return _fields(fields, PromptSize(len(prompt)), None, 0, _ends_of(prompt))


def prompt_of(path: bytes, body: bytes) -> str | Messages:
    """All prompt text, to be counted exactly. The body has been read before, so it is what it must be."""
    if path == COMPLETION_PATH:
        prompt = _texts.decode(_completion.decode(body).prompt)
        return prompt if isinstance(prompt, str) else "".join(part for part in prompt if isinstance(part, str))
    return [(_text(message.role), _text(message.content)) for message in _chat.decode(body).messages]


READERS = {CHAT_PATH: read_chat, COMPLETION_PATH: read_completion}
"""The relayed paths, and what reads their bodies."""

PROMPT_KEYS = {CHAT_PATH: b'"messages"', COMPLETION_PATH: b'"prompt"'}
"""Where the prompt begins in their bodies."""


def rewritten(body: bytes, changes: dict[str, Any]) -> bytes:
    """The body with top-level fields set, or taken out where the new value is None; all other bytes as they came."""
    members = _members.decode(body)
    for name, value in changes.items():
        if value is None:
            members.pop(name, None)
        else:
            members[name] = Raw(_encode(value))
    return _encode(members)


def stream_options_with_usage(body: bytes) -> dict[str, Any]:
    """The body's stream options, asking for the usage event too."""
    raw = _members.decode(body).get("stream_options", _NULL)
    return {**(msgspec.json.decode(raw) or {}), "include_usage": True}


def _decoded(decoder: msgspec.json.Decoder[Any], body: bytes | Raw) -> Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message = str(error)
        path = _PATH.search(message)
        if path is None:
            raise bad_request(message, "body") from error
        raise bad_request(_PATH.sub("", message), "body" + path[1]) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", "body") from error


def _fields(body: Any, size: PromptSize, input_tokens: int | None, system: int = 0, turn: bytes = b"") -> RequestFields:
    options = body.stream_options
    if body.__class__ is _ChatBody and body.max_completion_tokens is not None:
        cap_tokens = _integer(body.max_completion_tokens, "max_completion_tokens")
    else:
        cap_tokens = _integer(body.max_tokens, "max_tokens")
    return RequestFields(
        body.model,
        body.stream if body.stream.__class__ is bool else _boolean(body.stream),
        options is not None and options.include_usage is True,
        size,
        input_tokens,
        cap_tokens,
        None if body.nvext is _ABSENT else _hint(body.nvext),
        1 if body.n is None else max(1, _integer(body.n, "n") or 1),
        body.tools is not _ABSENT and len(body.tools) > 2,
        body.response_format is not _ABSENT and len(body.response_format) > 2,
        len(body.chat_template_kwargs) > 2 or len(body.reasoning_effort) > 2,
        None if body.priority is None else _integer(body.priority, "priority"),
        body.service_tier,
        0 if body.tool_choice is _ABSENT else crc32(memoryview(body.tool_choice)[:_SYSTEM_BYTES]),
        system,
        turn,
        options is not None and options.include_energy is True,
    )


def _system_of(first: _Message) -> int:
    """What a system prompt is known again by: prompts that begin alike are taken for one."""
    if first.role == _SYSTEM or first.role == _DEVELOPER:
        return crc32(memoryview(first.content)[:_SYSTEM_BYTES])
    return 0


def _last_turn(messages: list[_Message]) -> bytes:
    """Both ends of what the user said last; of a long talk without a user only the last message is looked at."""
    for message in messages[: -_TURNS_BACK - 1 : -1]:
        if message.role == _USER:
            return _ends_of(message.content)
    return _ends_of(messages[-1].content) if messages else b""


def _ends_of(text: Raw) -> bytes:
    if len(text) <= OPENING_BYTES + ENDING_BYTES:
        return bytes(text)
    view = memoryview(text)
    return b"\0".join((view[:OPENING_BYTES], view[-ENDING_BYTES:]))


def _integer(value: float | str | None, name: str) -> int | None:
    if value is None or value.__class__ is int:
        return value
    try:
        number = float(value)
        if number.is_integer():
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise bad_request(f"Input should be a valid integer, got {value!r}", f"body.{name}")


def _boolean(value: bool | int | str | None) -> bool:
    if value is None:
        return False
    flag = _BOOLEANS.get(str(value).lower())
    if flag is None:
        raise bad_request(f"Input should be a valid boolean, got {value!r}", "body.stream")
    return flag


def _hint(nvext: Raw) -> int | None:
    """A hint is advice: a bad one is no hint."""
    try:
        hints = (_nvext.decode(nvext) or _NvExt()).agent_hints
        osl = None if hints is None or hints.osl is None else int(float(hints.osl))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, OverflowError):
        return None
    return osl if osl is not None and osl >= 0 else None


def _text(raw: Raw) -> str:
    """A role or content as text; parts are joined, what is no text is left out."""
    content = msgspec.json.decode(raw) if len(raw) else ""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _parts_bytes(content: Raw) -> int:
    """Text of a content that came in parts; images and audio are no text."""
    try:
        return sum(len(part.text) for part in _parts.decode(content))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return len(content)
