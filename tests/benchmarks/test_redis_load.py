"""The Redis benchmark: its deployment is one our settings accept, and its numbers come from the server asked."""

import os
import shutil
import subprocess
import time

import pytest
import yaml
from redis import Redis

from benchmarks.redis_load import INSTANCES, _decode_ms_per_mb, _free_port, _large, _process, _settings, _until
from dynamollm.adapters.configuration import load
from pools.classes import RequestClass


def test_the_deployment_is_valid_and_has_the_instances_it_says(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(_settings([f"n-{n}" for n in range(8)], 9300, 6379)))
    settings = load(path, {})
    assert sum(pool.instances for pool in settings.pools) == INSTANCES
    assert (settings.store.kind, settings.store.url) == ("redis", "redis://127.0.0.1:6379/0")
    assert RequestClass[settings.pools[0].request_class] is RequestClass.LL
    assert set(settings.driver.emulators) == {name for node in settings.nodes for name in node.names()}


def test_decoding_is_told_by_the_megabyte():
    small, large = b'{"a": 1}', b'{"a": [%s]}' % b",".join([b"1.5"] * 2000)
    assert _decode_ms_per_mb([small]) > 0
    assert 0.05 < _decode_ms_per_mb([large]) < 500


def test_a_process_is_ended_with_the_block():
    with _process(["sleep", "60"]):
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10
    assert subprocess.run(["pgrep", "-P", str(os.getpid()), "sleep"], check=False).returncode == 1


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed (Debian: redis-server)")
def test_large_values_cost_more_than_small_ones_on_a_real_server(tmp_path):
    port = _free_port()
    with _process(["redis-server", "--port", str(port), "--dir", str(tmp_path), "--save", ""]):
        client = Redis(port=port)
        _until(client.ping)
        one, many = _large(client, 1, 1), _large(client, 32, 100)
        assert (many.keys, many.kilobytes) == (32, 100)
        assert many.cpu_ms > one.cpu_ms
        client.close()
