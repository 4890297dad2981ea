"""The event heap: always the earliest row, ties to the lower row, rows move and vanish."""

from hypothesis import given
from hypothesis import strategies as st

from simulator.eventheap import EventHeap, clear_event, set_event

ROWS = 12


@given(st.lists(st.tuples(st.integers(0, ROWS - 1), st.one_of(st.none(), st.integers(0, 8))), max_size=80))
def test_the_first_is_the_earliest(changes):
    heap = EventHeap([0] * ROWS, [-1] * ROWS, [0], [0.0] * ROWS)
    wanted = {}
    for row, at_s in changes:
        if at_s is None:
            clear_event(heap, row)
            wanted.pop(row, None)
        else:
            set_event(heap, row, float(at_s))
            wanted[row] = at_s
        assert heap.size[0] == len(wanted)
        if wanted:
            assert heap.rows[0] == min(wanted, key=lambda r: (wanted[r], r))
