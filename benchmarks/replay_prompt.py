"""Prompts of a wanted number of tokens for a target whose tokenizer is not at hand. Pure.

The text is made of common four-letter English words: one token each for the usual byte-pair vocabularies, and of one
length, so that targets that estimate from bytes are as regular. One probe for each word tells which of them the target
counts alike; two more, how many tokens it counts for n of those: ``tokens = fixed + per_word * n`` (fixed: its chat
template). What was reached is measured on every answer.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_WORDS = """
time year work life hand part home week case city name game line book side head food team door form body view road land
"""
VOCABULARY = tuple(_WORDS.split())
WORD_BYTES = 5  # four letters and a space
TEXT_WORDS = 1 << 17
_STRIDE = 40_503  # odd: the starts of successive prompts are spread over the text and none repeats early


@dataclass(frozen=True, slots=True)
class Calibration:
    """How many tokens the target counts for a prompt of n words."""

    fixed_tokens: float = 0.0
    tokens_per_word: float = 1.0

    def words(self, input_tokens: int) -> int:
        """Words of the prompt that comes closest to this many tokens; at least one."""
        return max(1, round((input_tokens - self.fixed_tokens) / self.tokens_per_word))


def calibrated(fewer: tuple[int, int], more: tuple[int, int]) -> Calibration:
    """The line through two probes, each (words, tokens the target counted).

    Raises ValueError if the target's count does not grow with the prompt.
    """
    per_word = (more[1] - fewer[1]) / (more[0] - fewer[0])
    if not per_word > 0:
        raise ValueError(
            f"the target counted {fewer[1]} tokens for {fewer[0]} words and {more[1]} for {more[0]}: "
            "its usage.prompt_tokens does not follow the prompt"
        )
    return Calibration(fewer[1] - per_word * fewer[0], per_word)


def counted_alike(tokens: Mapping[str, int]) -> tuple[str, ...]:
    """The largest group of words that the target counted the same number of tokens for; the cheaper one of equals."""
    groups = Counter(tokens.values())
    commonest = min(groups, key=lambda count: (-groups[count], count))
    return tuple(word for word, count in tokens.items() if count == commonest)


def repeated(word: str, words: int) -> bytes:
    """A prompt of one word, over and over."""
    return f" {word}".encode() * words


class PromptText:
    """A long seeded text; each prompt is a stretch of it that begins somewhere else, so that no prefix cache helps."""

    def __init__(self, words: tuple[str, ...] = VOCABULARY, seed: int = 0) -> None:
        picked = np.random.default_rng(seed).integers(len(words), size=TEXT_WORDS)
        spelled = [f" {word}".encode() for word in words]
        self._text = 2 * b"".join([spelled[index] for index in picked])  # a whole text from any start

    def stretch(self, number: int, words: int) -> bytes:
        """``words`` words for request ``number``, a space before each: ASCII without anything to escape."""
        text = self._text if words <= TEXT_WORDS else self._text * (1 + words // TEXT_WORDS)
        start = (number * _STRIDE) % TEXT_WORDS * WORD_BYTES
        return text[start : start + words * WORD_BYTES]
