"""EventHeap: a binary heap of engine rows by the time of their next event; ties go to the lower row.

Each row has at most one event, which can move or vanish, so the heap is indexed. Functions over arrays, compiled with
the loop.
"""

from collections.abc import MutableSequence
from typing import NamedTuple

Ints = MutableSequence[int]


class EventHeap(NamedTuple):
    """Rows in heap order, where each row stands (-1 = nowhere), how many there are, and their times."""

    rows: Ints
    position: Ints
    size: Ints  # one element
    time_s: MutableSequence[float]


def _before(h: EventHeap, row: int, other: int) -> bool:
    if h.time_s[row] != h.time_s[other]:
        return h.time_s[row] < h.time_s[other]
    return row < other


def _place(h: EventHeap, index: int, row: int) -> None:
    h.rows[index] = row
    h.position[row] = index


def _sift_up(h: EventHeap, index: int) -> None:
    row = h.rows[index]
    while index > 0:
        parent = (index - 1) // 2
        if not _before(h, row, h.rows[parent]):
            break
        _place(h, index, h.rows[parent])
        index = parent
    _place(h, index, row)


def _sift_down(h: EventHeap, index: int) -> None:
    row = h.rows[index]
    size = h.size[0]
    while True:
        child = 2 * index + 1
        if child >= size:
            break
        if child + 1 < size and _before(h, h.rows[child + 1], h.rows[child]):
            child += 1
        if not _before(h, h.rows[child], row):
            break
        _place(h, index, h.rows[child])
        index = child
    _place(h, index, row)


def set_event(h: EventHeap, row: int, at_s: float) -> None:
    """The next event of a row is then, whatever it was before."""
    h.time_s[row] = at_s
    if h.position[row] < 0:
        index = h.size[0]
        h.size[0] += 1
        _place(h, index, row)
    _sift_up(h, h.position[row])
    _sift_down(h, h.position[row])


def clear_event(h: EventHeap, row: int) -> None:
    """The row has no next event."""
    index = h.position[row]
    if index < 0:
        return
    h.position[row] = -1
    h.size[0] -= 1
    last = h.rows[h.size[0]]
    if last != row:
        _place(h, index, last)
        _sift_up(h, index)
        _sift_down(h, h.position[last])
