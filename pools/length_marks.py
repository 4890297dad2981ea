"""Marks: a request's features as positions in one table of weights, by hashing.

Words come from both ends of the last user turn and nowhere else, at most ``OPENING_WORDS`` + ``ENDING_WORDS`` of them,
so a prompt written to be dear costs what any long prompt costs. Checksums, not Python's ``hash``: the same in every
process and after a restart. No text is kept.
"""

import re
from binascii import crc32
from functools import lru_cache
from itertools import chain, pairwise, repeat
from math import log2
from operator import and_
from typing import NamedTuple

from pools.lengths import LengthFeatures

TABLE = 1 << 16
OPENING_WORDS = 16
ENDING_WORDS = 10
PAIRS = 4  # neighbours counted together, from the beginning on: how a request is put
TURN_BYTES = 256  # read at most, whoever calls
_WORD = re.compile(rb'(\\[nrt"]|\\u[0-9a-f]{4}|[a-z\x80-\xff]{1,12}|[0-9]{1,4}|[^ a-z0-9\x80-\xff])')
_MASK = TABLE - 1
# words are gone through by the interpreter's own loops: this runs for every request
_words_of = _WORD.split
_MASKS = repeat(_MASK)
Salts = tuple[int, int, int]  # of a model: for its form and pairs, its opening words, its ending words
_pair = b" ".join


class Marks(NamedTuple):
    """Positions in the table of weights."""

    own: list[int]  # that only this tenant's requests have
    shared: list[int]  # of the request's form
    words: list[int]  # of its text; without repeats


def coarse(input_tokens: int) -> int:
    """An input's length to seven binary digits, 1.6 % at worst: what finer ones add was not seen to be worth it."""
    if input_tokens < 128:
        return max(input_tokens, 0)
    cut = input_tokens.bit_length() - 7
    return input_tokens >> cut << cut


def marks_of(features: LengthFeatures) -> Marks:
    """The marks of a request; what they say is told apart by model."""
    model, inputs, _, _, tools, structured, thinking, tenant, tier, tool_choice, system, turn = features
    form = tools | structured << 1 | thinking << 2
    salts, own, shared = _form_marks(model, coarse(inputs), form, tool_choice, tier or "", tenant, system)
    return Marks(own, shared, _words(turn, salts) if turn else [])


@lru_cache(4096)
def _form_marks(
    model: str, inputs: int, form: int, tool_choice: int, tier: str, tenant: str, system: int
) -> tuple[Salts, list[int], list[int]]:
    """The model's salts, and the marks that are not of the text: many requests have the same."""
    salt = crc32(model.encode("utf-8", "surrogatepass"))
    octaves = log2(inputs + 1.0)
    tier_sum = crc32(tier.encode("utf-8", "surrogatepass"))
    tenant_sum = crc32(tenant.encode("utf-8", "surrogatepass"), salt)
    shared = [
        crc32(b"i%d" % inputs, salt) & _MASK,
        crc32(b"e%d" % int(8.0 * octaves), salt) & _MASK,
        crc32(b"o%d.%d" % (int(octaves), form), salt) & _MASK,
        crc32(b"f%d.%d.%d" % (form, tool_choice, tier_sum), salt) & _MASK,
    ]
    own = [crc32(b"t", tenant_sum) & _MASK, crc32(b"s%d.%d" % (system, form), tenant_sum) & _MASK]
    if system:
        shared.append(crc32(b"s%d.%d" % (system, form), salt) & _MASK)
    return (salt, crc32(b"w", salt), crc32(b"z", salt)), own, shared


def _words(turn: bytes, salts: Salts) -> list[int]:
    salt, opening_salt, ending_salt = salts
    opening, _, ending = turn[:TURN_BYTES].lower().partition(b"\0")
    parts = _words_of(opening, OPENING_WORDS)  # words, what is between them, and what is left
    ending = ending or b"".join(parts[2 * OPENING_WORDS :])
    first, last = parts[1::2], _words_of(ending, ENDING_WORDS)[1::2]
    pairs = map(_pair, pairwise(first[: PAIRS + 1]))
    words = map(crc32, first, repeat(opening_salt)), map(crc32, last, repeat(ending_salt))
    more = map(crc32, pairs, repeat(salt)), (crc32(b"l%d" % len(turn).bit_length(), salt),)
    return list(set(map(and_, chain(*words, *more), _MASKS)))
