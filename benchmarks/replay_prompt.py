"""Prompts of a wanted number of tokens for a target whose tokenizer is not at hand. Pure.

The text is made of common four-letter English words: one token each for the usual byte-pair vocabularies, and of one
length, so that targets that estimate from bytes are as regular. Two probes tell what the target counts for n words:
``tokens = fixed + per_word * n`` (fixed: its chat template). What was reached is measured on every answer.
"""

from dataclasses import dataclass

import numpy as np

_WORDS = """
time year work life hand part home week case fact city name game line book word side head food team door form body view
plan road land wall tree bird fish king snow rain wind fire gold ship farm milk rock sand moon star blue cold warm dark
deep fast high long next open rich slow tall wide wild wise able best both each even ever
"""
VOCABULARY = _WORDS.split()
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


class PromptText:
    """A long seeded text; each prompt is a stretch of it that begins somewhere else, so that no prefix cache helps."""

    def __init__(self, seed: int = 0) -> None:
        picked = np.random.default_rng(seed).integers(len(VOCABULARY), size=TEXT_WORDS)
        self._text = b"".join(f"{VOCABULARY[index]} ".encode() for index in picked)

    def stretch(self, number: int, words: int) -> bytes:
        """``words`` words for request ``number``: ASCII without anything to escape, no space at the end."""
        text = self._text * (2 + words // TEXT_WORDS)
        start = (number * _STRIDE) % TEXT_WORDS * WORD_BYTES
        return text[start : start + words * WORD_BYTES - 1]
