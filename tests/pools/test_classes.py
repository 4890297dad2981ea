"""Request classes, their cuts, their SLOs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.classes import REQUEST_CLASSES, ClassCuts, ClassSlos, RequestClass, Slo

classes = st.sampled_from(REQUEST_CLASSES)


@pytest.mark.parametrize(
    ("input_tokens", "output_tokens", "name"),
    [
        (0, 0, "SS"),
        (255, 99.9, "SS"),
        (256, 100, "MM"),
        (1023, 349.9, "MM"),
        (1024, 350, "LL"),
        (100_000, 1, "LS"),
        (1, 1e6, "SL"),
    ],
)
def test_the_papers_cuts(input_tokens, output_tokens, name):
    assert ClassCuts().classify(input_tokens, output_tokens).name == name


@given(st.integers(0, 10**6), st.floats(0, 1e6), st.integers(0, 10**6), st.floats(0, 1e6))
def test_longer_requests_have_dominating_classes(inputs, outputs, more_inputs, more_outputs):
    cuts = ClassCuts()
    assert cuts.classify(inputs + more_inputs, outputs + more_outputs).dominates(cuts.classify(inputs, outputs))


@given(classes, classes, classes)
def test_domination_is_a_partial_order(a, b, c):
    assert a.dominates(a)
    assert not (a.dominates(b) and b.dominates(a)) or a is b
    assert not (a.dominates(b) and b.dominates(c)) or a.dominates(c)
    assert RequestClass.LL.dominates(a)
    assert a.dominates(RequestClass.SS)


def test_sl_may_go_to_ml_never_to_ms():
    assert RequestClass.ML.dominates(RequestClass.SL)
    assert not RequestClass.MS.dominates(RequestClass.SL)


@given(classes)
def test_a_class_is_its_sizes(c):
    assert RequestClass.of_sizes(c.input_size, c.output_size) is c
    assert c.name == "SML"[c.input_size] + "SML"[c.output_size]


def test_slos_follow_the_input_and_scale_beyond_the_longest():
    slos = ClassSlos()
    assert slos.slo(RequestClass.SL, 10) == Slo(0.25, 0.1)
    assert slos.slo(RequestClass.MS, 500) == Slo(0.4, 0.1)
    assert slos.slo(RequestClass.LL, 8192) == Slo(2.0, 0.1)
    assert slos.slo(RequestClass.LL, 81_920) == Slo(20.0, 0.1)


def test_the_stricter_slo_in_each_dimension():
    assert Slo(0.2, 0.1).stricter(Slo(0.4, 0.05)) == Slo(0.2, 0.05)
