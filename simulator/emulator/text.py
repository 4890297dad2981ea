"""What an emulated model reads and writes: token counts, output lengths and words, all of them deterministic.

Without a tokenizer a token is four bytes of UTF-8 (the usual rule of thumb for English), and its id is those bytes as
a number, so that ``/detokenize`` undoes ``/tokenize``. A chat costs what Llama 3's template adds. The words mean
nothing. Never reads a file and has no randomness of its own.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

CHAT_TOKENS = 1  # beginning of text
MESSAGE_TOKENS = 5  # header of three tokens, blank line, end of turn
GENERATION_TOKENS = 4  # header of the answer
BYTES_PER_TOKEN = 4
FOUR_BYTE_VOCABULARY = 1 << 32

_COMMON_WORDS = """
the of and to in that it is was for on as with at by an be this from or have not are but had which one you
were all her she there would their we him been has when who will no more if out so up said what its about than
into them can only other time new some could these two may first then do any like my now over such our man me
even most made after also did many off before must well back through years where much your way down should
because long each just state those people too mr how little good world make very year still see work life men
day get here between both under
"""
_WORDS = _COMMON_WORDS.split()


def _stable_hash(text: bytes, seed: int) -> int:
    return zlib.crc32(text, seed & 0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Words:
    """The output of one sequence: token ``i`` is one word with a space before it."""

    seed: int

    def at(self, i: int) -> str:
        """Text of output token ``i``."""
        return " " + _WORDS[((self.seed >> 8) + i * (2 * (self.seed & 63) + 1)) % len(_WORDS)]

    def text(self, tokens: int) -> str:
        """The first ``tokens`` tokens together."""
        return "".join([self.at(i) for i in range(tokens)])


def output_seed(prompt: bytes, seed: int, choice: int) -> int:
    """What decides the words and the length of one choice: the prompt, the request's seed, its index."""
    return _stable_hash(prompt, _stable_hash(b"%d/%d" % (seed, choice), 0))


@dataclass(frozen=True, slots=True)
class OutputLengths:
    """Log-normal output lengths for requests that may stop by themselves.

    The defaults have the median (129) and the 90th percentile (424) of the Azure Conversation trace's outputs.
    """

    median_tokens: float = 129.0
    sigma: float = 0.928

    def tokens(self, seed: int) -> int:
        """Length that belongs to this seed, at least 1."""
        share = (_stable_hash(b"length", seed) + 0.5) / (1 << 32)
        return max(1, round(self.median_tokens * math.exp(self.sigma * NormalDist().inv_cdf(share))))


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def count(self, text: str) -> int:
        """How many tokens a text has; as ``len(encode(text))``, but cheaper where it can be."""

    def count_chat(self, messages: Sequence[tuple[str, str]]) -> int:
        """Tokens of a conversation, (role, content) each, through the chat template, with the header of the answer."""

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation; as many as ``count_chat`` says."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""


class FourByteTokenizer:
    """A token is four bytes of UTF-8."""

    @property
    def vocabulary(self) -> int:
        """Four bytes and one id for every part of the chat template."""
        return FOUR_BYTE_VOCABULARY + 1

    def encode(self, text: str) -> list[int]:
        """Ids: each the number its four bytes are."""
        raw = text.encode()
        return [int.from_bytes(raw[at : at + BYTES_PER_TOKEN]) for at in range(0, len(raw), BYTES_PER_TOKEN)]

    def count(self, text: str) -> int:
        """One for every four bytes begun."""
        size = len(text) if text.isascii() else len(text.encode())
        return -(-size // BYTES_PER_TOKEN)

    def count_chat(self, messages: Sequence[tuple[str, str]]) -> int:
        """Contents and the parts of the template."""
        contents = sum(self.count(content) for _, content in messages)
        return CHAT_TOKENS + len(messages) * MESSAGE_TOKENS + contents + GENERATION_TOKENS

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Contents between parts of the template."""
        part = [FOUR_BYTE_VOCABULARY]
        ids = CHAT_TOKENS * part
        for _, content in messages:
            ids += (MESSAGE_TOKENS - 1) * part + self.encode(content) + part
        return ids + GENERATION_TOKENS * part

    def decode(self, ids: Sequence[int]) -> str:
        """The bytes of the ids; template parts are empty."""
        pieces = [i.to_bytes((i.bit_length() + 7) // 8) for i in ids if i < FOUR_BYTE_VOCABULARY]
        return b"".join(pieces).decode(errors="replace")
