"""What drivers that start engines check alike, in this order: the id, the GPUs, the model."""

import pytest

from pools.drivers.checks import check_room, model_of
from pools.drivers.port import DriverError, GpuBusyError, InstanceSpec, StartRefusedError, UnknownGpuError
from pools.instances import GpuSlot, InstanceShape

NODES = {"n0": 4, "n1": 2}


def spec(instance_id, *gpus, node="n0", model="llama"):
    slots = tuple(GpuSlot(node, index) for index in gpus)
    return InstanceSpec(instance_id, "pool", InstanceShape(model, "H100-SXM", len(slots)), slots, 1980)


RUNNING = (spec("a", 0, 1), spec("b", 0, node="n1"))


@pytest.mark.parametrize("wanted", [spec("c", 2, 3), spec("c", 1, node="n1")], ids=["beside a", "beside b"])
def test_free_gpus_of_a_known_node_are_room(wanted):
    check_room(wanted, RUNNING, NODES)


@pytest.mark.parametrize(
    ("wanted", "error", "told"),
    [
        (spec("a", 2, 3), DriverError, "instance a runs already"),
        (spec("c", 1, 2), GpuBusyError, "instance c: GPU 1 of n0 is held by a"),
        (spec("c", 3, 4), UnknownGpuError, "instance c: there is no GPU 4 on node 'n0'"),
        (spec("c", 0, node="n7"), UnknownGpuError, "there is no GPU 0 on node 'n7'"),
    ],
    ids=["id", "held", "no index", "no node"],
)
def test_what_is_wrong_is_named(wanted, error, told):
    with pytest.raises(error, match=told):
        check_room(wanted, RUNNING, NODES)


def test_a_taken_id_is_told_before_its_gpus():
    with pytest.raises(DriverError, match="runs already"):
        check_room(spec("b", 9, node="n7"), iter(RUNNING), NODES)


def test_the_model_is_one_of_those_there_are():
    assert model_of(spec("c", 2), {"llama": 7, "qwen": 8}) == 7
    with pytest.raises(StartRefusedError, match="instance c: no model 'gpt'; known: llama, qwen"):
        model_of(spec("c", 2, model="gpt"), {"llama": 7, "qwen": 8})
