"""Two gateways, two controllers, Redis and eight instances, as processes; then the leader is killed, then Redis.

How long each outage may last here is short; `python -m benchmarks.failover` has Redis away for 30 s, and prints times.
"""

import time

import httpx
import pytest
from server_marks import needs_redis

from benchmarks.adapters.shared_deployment import TERM_EPOCHS, Load, deployed, wait_for

pytestmark = needs_redis
NEW_PLAN_WITHIN_S = 5.0  # promised; said and measured by the benchmark, allowed twice that on a busy machine here
REDIS_AWAY_S = 6.0


@pytest.mark.slow
def test_no_request_is_lost_when_the_leader_is_killed_and_when_redis_is(tmp_path):
    with deployed(tmp_path) as deployment:
        load = Load(deployment.urls)
        wait_for(lambda: deployment.plan()[1] >= 1, "a first plan")
        leader, (epoch, _) = deployment.leader(), deployment.published()

        # kill -9 the leader: the standby takes the instances over and plans
        deployment.controllers.pop(leader).kill()
        (standby,) = deployment.controllers
        took_s = wait_for(lambda: deployment.plan()[0] >= TERM_EPOCHS * (epoch + 1), "a plan of the standby")
        assert took_s < 2 * NEW_PLAN_WITHIN_S
        assert deployment.leader() == standby
        assert deployment.published()[0] == epoch + 1
        time.sleep(1.0)
        assert load.failures == []

        # kill -9 Redis: gateways serve on, the plan is held, and all of it goes on when Redis is back, empty
        deployment.redis.kill()
        answered = load.answered
        time.sleep(REDIS_AWAY_S)
        assert load.answered > answered + 10
        assert httpx.get(f"{deployment.urls[0]}/ready").status_code == 200
        deployment.redis.start()
        wait_for(lambda: deployment.published()[0] == epoch + 1, "the leader to go on in its epoch")
        time.sleep(2.0)
        answered = load.end()
        assert load.failures == []
        wait_for(lambda: deployment.booked() >= answered, "the ledger to be complete", 30.0)
        assert deployment.booked() == answered
        status = deployment.status()
        assert {i["state"] for i in status["instances"]} <= {"ready", "parked", "draining", "starting"}
        statuses = deployment.close()
        assert set(statuses.values()) == {0}
