"""Clusters that several suites run on, each started once and only if it is asked for."""

from collections.abc import Iterator

import pytest
from ray_examples import RayMachines, ray_machines


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayMachines]:
    with ray_machines() as machines:
        yield machines
