"""A gateway that is killed, and started again: its real engines are adopted, and serve on.

The first of these tests by name, so that all others are run on adopted engines too.
"""

import os
import signal

from test_vllm_faults import STREAMS, all_run, finished, together
from vllm_cluster import eventually


def test_a_gateway_that_is_killed_and_started_again_adopts_its_engines(cluster):
    engines, addresses = cluster.engine_processes(), dict(cluster.addresses)
    served = {engine.id: cluster.process_of(engine) for engine in cluster.engines}
    assert len(engines) == 2

    def kill():
        all_run(*cluster.engines)
        cluster.stop(signal.SIGKILL)

    seen = together(cluster, STREAMS, 2000, kill, lost=True)  # their clients have lost them with the gateway
    assert not any(finished(s, 2000) for s in seen if s is not None)
    assert cluster.engine_processes() == engines
    for engine in cluster.engines:
        eventually(lambda engine=engine: engine.running == 0, "their requests went with the gateway")

    took_s = cluster.start()
    print(f"ready after {took_s:.1f} s, with no engine started; load of the host {os.getloadavg()[0]:.1f}")
    assert cluster.engine_processes() == engines, "".join(cluster.said)
    assert cluster.addresses == addresses
    assert {engine.id: cluster.process_of(engine) for engine in cluster.engines} == served
    seen = together(cluster, 2 * STREAMS, 40)
    assert all(finished(s, 40) for s in seen), seen
    assert {s.instance for s in seen} == set(addresses)
