"""Commanding: what whoever commands a cluster shows of itself, in the gateway's process or in the controller's."""

from collections.abc import Callable
from typing import Protocol

from dynamollm.control_loop import ControlLoop
from dynamollm.counterfactual import Counterfactual
from dynamollm.deployment import Deployment
from dynamollm.metering import Metering
from dynamollm.observation import CountedQueue
from dynamollm.operations import Operations
from dynamollm.settings import Settings
from energy.accounting_ledger import EnergyLedger


class CountedFleet(Protocol):
    """What is on the instances, and what waits for them."""

    @property
    def queue(self) -> CountedQueue:
        """What waits."""

    def in_flight(self, instance_id: str) -> int:
        """Requests on an instance."""


class Commanding(Protocol):
    """``dynamollm.wiring.Application``, ``dynamollm.term.ControllerTerm``."""

    @property
    def settings(self) -> Settings:
        """The configuration."""

    @property
    def deployment(self) -> Deployment:
        """What runs."""

    @property
    def router(self) -> CountedFleet:
        """What is on it."""

    @property
    def control(self) -> ControlLoop:
        """What was decided."""

    @property
    def operations(self) -> Operations:
        """What became of it."""

    @property
    def ledger(self) -> EnergyLedger:
        """What was booked."""

    @property
    def metering(self) -> Metering | None:
        """What the GPUs draw."""

    @property
    def counterfactual(self) -> Counterfactual | None:
        """What other policies would have used; None where nothing is compared."""

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds."""
