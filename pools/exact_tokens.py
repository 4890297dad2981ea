"""Exact input tokens: a Hugging Face tokenizer and the model's chat template, given as text.

Of a conversation, the template's own tokens are worked out once, from how it renders small ones: so many at the
start, so many around a message of each role, so many to prompt the answer. Then only the contents have to be encoded.
That is exact for templates that treat every message of a role alike, which is checked at the start (but for white
space at the edge of a content, where it merges with the template's); of others the whole rendering is counted.

Pure: reads no file (that is ``pools/adapters/tokenizer_files.py``). Imports tokenizers and jinja2, so import it only
where a tokenizer is configured.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from pools.tokens import Messages

Render = Callable[[Messages], str]
Count = Callable[[str], int]
ROLES = ("system", "user", "assistant")


class TemplateRefusal(ValueError):
    """A chat template refuses a conversation, or is no template; the message says which."""


@dataclass(frozen=True, slots=True)
class ChatOverhead:
    """Tokens of a template that are not of the contents."""

    start: int  # of the whole conversation, the prompt for the answer included
    message: Mapping[str, int]  # around each message, by role
    trims: bool  # it takes white space off the contents

    def tokens(self, roles: list[str]) -> int | None:
        """Of a conversation of these roles; None if one was not seen."""
        try:
            return self.start + sum(self.message[role] for role in roles)
        except KeyError:
            return None


def overhead_of(render: Render, count: Count) -> ChatOverhead | None:
    """The overhead of a template; None if it does not treat messages alike."""
    word = "word"

    def around(*roles: str) -> int:
        return count(render([(role, word) for role in roles])) - len(roles) * count(word)

    try:
        lone = around("user")
        assistant_and_user = around("user", "assistant", "user") - lone
        pair = around("user", "assistant") - lone
        user = assistant_and_user - pair
        message = {"user": user, "assistant": pair}
        start = lone - user
        with suppress(TemplateRefusal):  # some models know no system message
            message["system"] = around("system", "user") - lone
        trims = render([("user", f" \n{word}\n ")]) == render([("user", word)])
        overhead = ChatOverhead(start, message, trims)
        for roles in (["user", "assistant"] * 3 + ["user"], ["system", "user", "assistant", "user"]):
            derived = overhead.tokens(roles)
            if derived is not None and derived != around(*roles):
                return None
    except TemplateRefusal:
        return None
    return overhead


class TokenizerTokens:
    """``ExactTokens`` of one model."""

    def __init__(
        self, tokenizer_json: str, chat_template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """Raises ``ValueError`` if the tokenizer, ``TemplateRefusal`` if the template cannot be used."""
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # it raises no narrower one
            raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = _compiled(chat_template) if chat_template is not None else None
        self._special_tokens = dict(special_tokens or {})
        self.overhead = overhead_of(self.render, self._count) if self._template is not None else None

    def of_text(self, text: str) -> int:
        """Tokens of a plain prompt, with those the tokenizer adds (a BOS)."""
        return len(self._tokenizer.encode(text).ids)

    def of_chat(self, messages: Messages) -> int:
        """Tokens of a conversation; without a template, of its contents alone."""
        overhead = self.overhead
        trims = overhead is not None and overhead.trims
        contents = sum(self._count(text.strip() if trims else text) for _, text in messages)
        around = overhead.tokens([role for role, _ in messages]) if overhead is not None else None
        if around is not None or self._template is None:
            return contents + (around or 0)
        try:
            return self._count(self.render(messages))
        except TemplateRefusal:
            return contents  # the engine will refuse it, too

    def render(self, messages: Messages) -> str:
        """The conversation as the model reads it, up to where it is to answer. Raises ``TemplateRefusal``."""
        if self._template is None:
            raise TemplateRefusal("no chat template is configured")
        said = [{"role": role, "content": text} for role, text in messages]
        try:
            text: str = self._template.render(messages=said, add_generation_prompt=True, **self._special_tokens)
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise TemplateRefusal(f"the chat template refuses the conversation: {error}") from error
        return text

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)


def _compiled(chat_template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda _: "01 Jan 2024"  # its length is what counts
    try:
        return environment.from_string(chat_template)
    except TemplateError as error:
        raise TemplateRefusal(f"not a chat template: {error}") from error


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)
