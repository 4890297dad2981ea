"""Marks: what tells requests apart, that any bytes do, and that no prompt makes them dear."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools import length_marks
from pools.length_marks import ENDING_WORDS, OPENING_WORDS, PAIRS, TABLE, TURN_BYTES, coarse, marks_of
from pools.lengths import LengthFeatures

PLAIN = LengthFeatures("m", 500, turn=b'"tell me a story"')
MOST_WORDS = OPENING_WORDS + ENDING_WORDS + PAIRS + 1


@given(st.binary(max_size=2000), st.text(max_size=20), st.text(max_size=20), st.integers(-(2**70), 2**70))
def test_any_bytes_give_bounded_marks(turn, model, tenant, inputs):
    marks = marks_of(LengthFeatures(model, inputs, tenant=tenant, turn=turn))
    assert all(0 <= mark < TABLE for group in marks for mark in group)
    assert len(marks.words) <= MOST_WORDS
    assert len(set(marks.words)) == len(marks.words)
    assert len(marks.own) + len(marks.shared) <= 8


class Counting:
    """Stands in for what splits text at words: counts what it is given to read and what is taken from it."""

    def __init__(self, split):
        self.split = split
        self.bytes = self.words = 0

    def __call__(self, text, most):
        parts = self.split(text, most)
        words = len(parts) // 2
        self.words += words
        self.bytes += len(text) - len(parts[-1]) * (words == most)  # what is left is not read
        return parts


def work_of(turn, monkeypatch):
    """Bytes read, words taken, and marks made of a turn."""
    counting = Counting(length_marks._words_of)
    with monkeypatch.context() as patch:
        patch.setattr(length_marks, "_words_of", counting)
        marks = marks_of(PLAIN._replace(turn=turn))
    return counting.bytes, counting.words, len(marks.words)


USUAL = b'"Can you please write a short summary of the following article for me, in plain words that my grandmother '
USUAL += b"would understand? Leave out the numbers.\0and do not forget to name the author and the year, thanks a lot."


@pytest.mark.parametrize(
    "part", [b" a", b"\\n", b"\\u0041", b"!", b"9", b"\xff", b"\0", b"z" * 999, b"\\", b'"', b"a1", b"\\u00", b" "]
)
@pytest.mark.parametrize("times", [1, 100, 1_000_000])
def test_no_prompt_costs_more_than_a_usual_one(part, times, monkeypatch):
    usual, dear = work_of(USUAL, monkeypatch), work_of(part * times, monkeypatch)
    assert usual[1] == OPENING_WORDS + ENDING_WORDS  # it has all the words that are looked at
    assert dear[0] <= TURN_BYTES
    assert dear[1] <= usual[1]
    assert dear[2] <= MOST_WORDS <= 2 * usual[2]


def test_the_same_in_every_process():
    code = "from pools.length_marks import *; print(marks_of(LengthFeatures('m', 500, turn=b'\"tell me a story\"')))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert said == {str(marks_of(PLAIN))}


@pytest.mark.parametrize(
    "other",
    [
        {"model": "n"},
        {"input_tokens": 5000},
        {"tools": True},
        {"structured": True},
        {"thinking": True},
        {"tenant": "acme"},
        {"tier": "flex"},
        {"tool_choice": 7},
        {"system": 7},
        {"turn": b'"tell me a joke"'},
    ],
)
def test_each_feature_makes_a_difference(other):
    assert marks_of(PLAIN._replace(**other)) != marks_of(PLAIN)


def test_what_a_tenant_alone_has_is_its_own():
    acme, other = marks_of(PLAIN._replace(tenant="acme")), marks_of(PLAIN._replace(tenant="other"))
    assert not set(acme.own) & set(other.own)
    assert (acme.shared, acme.words) == (other.shared, other.words)


def test_words_are_without_case_and_both_ends_count():
    assert marks_of(PLAIN._replace(turn=b'"TELL me A Story"')) == marks_of(PLAIN)
    text = b"word " * 30
    one, other = (set(marks_of(PLAIN._replace(turn=text + b"\0" + end)).words) for end in (b"in brief", b"in depth"))
    assert len(one ^ other) == 2


@given(st.integers(0, 2**40))
def test_coarse_lengths_are_near(tokens):
    assert coarse(tokens) <= tokens <= coarse(tokens) * (1 + 1 / 63)
    assert coarse(coarse(tokens)) == coarse(tokens)
