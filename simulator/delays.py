"""Delays: how long changes of the pretend cluster take. Every one is paid in energy as well: see simulator.cluster."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Delays:
    """Seconds from an order to its effect.

    Defaults: DynamoLLM's table of the costs of change (6-8 min for a new instance on a new machine, of which what is
    left with weights on the local disk and a running node is the load and engine set-up), vLLM sleep level 1, and NVML
    locked clocks (4.5 ms median a call, calls of one node's driver one after the other).
    """

    node_on_s: float = 360.0  # a node that was off: machine, driver, containers
    start_s: float = 60.0  # an engine on a running node: weights from local disk, graph capture
    wake_s: float = 5.0  # a parked engine: weights from host memory
    reshard_s: float = 60.0  # after the drain, on GPUs that hold weights; vLLM starts anew
    clock_s: float = 0.05
