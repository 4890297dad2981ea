"""Placement: instances inside one node, aligned, never two on one GPU."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamollm.placement import NoRoomError, Placement
from pools.instances import GpuSlot


def test_an_instance_stands_aligned_inside_one_node():
    placement = Placement({"a": 8})
    assert [gpu.index for gpu in placement.take(4)] == [0, 1, 2, 3]
    assert [gpu.index for gpu in placement.take(2)] == [4, 5]
    assert [gpu.index for gpu in placement.take(2)] == [6, 7]
    with pytest.raises(NoRoomError, match="a: 0"):
        placement.take(1)


def test_the_fullest_node_is_filled_first_so_that_whole_nodes_stay_free():
    placement = Placement({"a": 8, "b": 8})
    first = placement.take(2)[0].node
    assert {placement.take(2)[0].node for _ in range(3)} == {first}
    assert placement.take(8)[0].node != first


def test_small_instances_share_a_block_before_they_open_another():
    placement = Placement({"a": 8})
    taken = [placement.take(2) for _ in range(4)]
    placement.release(taken[1])
    placement.release(taken[2])
    placement.release(taken[3])
    assert [gpu.index for gpu in placement.take(1)] == [2]
    assert [gpu.index for gpu in placement.take(4)] == [4, 5, 6, 7]


def test_a_named_node_is_the_only_one_tried():
    placement = Placement({"a": 8, "b": 8})
    assert placement.take(8, node="b")[0].node == "b"
    with pytest.raises(NoRoomError):
        placement.take(1, node="b")
    with pytest.raises(NoRoomError, match="none"):
        placement.take(1, node="nowhere")


def test_nothing_is_placed_on_a_node_that_is_lost():
    lost = {"a"}
    placement = Placement({"a": 8, "b": 8}, lambda: lost)
    assert placement.take(2)[0].node == "b"
    with pytest.raises(NoRoomError, match="lost are a"):
        placement.take(8)
    with pytest.raises(NoRoomError):
        placement.take(1, node="a")
    lost.clear()
    assert placement.take(8)[0].node == "a"


def test_gpus_held_by_whoever_was_there_before_are_not_given_again():
    placement = Placement({"a": 4})
    placement.hold([GpuSlot("a", 0), GpuSlot("a", 1)])
    assert [gpu.index for gpu in placement.take(2)] == [2, 3]
    with pytest.raises(NoRoomError):
        placement.take(1)


@given(st.lists(st.sampled_from([1, 2, 4, 8, -1]), max_size=40), st.integers(1, 4))
def test_no_gpu_is_ever_held_twice(steps, nodes):
    placement = Placement({f"n{index}": 8 for index in range(nodes)})
    held = []
    for step in steps:
        if step < 0 and held:
            placement.release(held.pop(0))
        elif step > 0:
            try:
                held.append(placement.take(step))
            except NoRoomError:
                continue
        flat = [gpu for gpus in held for gpu in gpus]
        assert len(flat) == len(set(flat))
        assert sum(placement.free_gpus(node) for node in placement.nodes) == 8 * nodes - len(flat)
        assert all(gpus[0].index % len(gpus) == 0 and len({gpu.node for gpu in gpus}) == 1 for gpus in held)
