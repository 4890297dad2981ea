"""One page of several processes: every sample once, with the process it comes from, families together."""

import asyncio

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.site_metrics import TELL_S, TTL_S, SiteMetrics, merged
from simulator.virtual_loop import run


def page(count: float, pool: str = "LL") -> str:
    registry = CollectorRegistry()
    Counter("requests", "Requests.", ["pool"], registry=registry).labels(pool).inc(count)
    Gauge("lag_seconds", "Lag, without a label.", registry=registry).set(0.25)
    Histogram("ttft_seconds", "TTFT.", ["pool"], buckets=(0.1, 1.0), registry=registry).labels(pool).observe(0.5)
    return generate_latest(registry).decode()


def halves(text: str) -> list[bytes]:
    middle = len(text) // 2
    return [text[:middle].encode(), text[middle:].encode()]


def samples(text: str) -> dict[tuple[str, str, str], float]:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, sample.labels["replica"], sample.labels.get("pool", "") + sample.labels.get("le", ""))
            assert key not in found
            found[key] = sample.value
    return found


def test_every_sample_is_there_with_its_process_and_the_page_is_prometheus_own_format():
    text = merged({"b": page(2.0), "a": page(3.0, 'odd "pool"} 7')})
    found = samples(text)
    assert found["requests_total", "b", "LL"] == 2.0
    assert found["requests_total", "a", 'odd "pool"} 7'] == 3.0
    assert found["lag_seconds", "a", ""] == found["lag_seconds", "b", ""] == 0.25
    assert found["ttft_seconds_bucket", "b", "LL1.0"] == 1.0
    assert len(found) == 2 * len(list(filter(None, (line for line in page(1.0).splitlines() if line[0] != "#"))))
    assert text.count("# TYPE requests_total counter") == 1


def test_a_family_that_only_one_has_is_told_once():
    text = merged({"a": "# HELP x X.\n# TYPE x gauge\nx 1.0\n", "b": ""})
    assert text == '# HELP x X.\n# TYPE x gauge\nx{replica="a"} 1.0\n'


def test_processes_of_one_site_answer_for_each_other_until_one_falls_silent():
    async def main() -> None:
        now = asyncio.get_running_loop().time
        store = SqliteStore(clock=now)
        counts = {"a": 1.0, "b": 5.0, "elsewhere": 9.0}
        sites = {
            name: SiteMetrics(store, "here" if name in "ab" else "there", name, lambda n=name: halves(page(counts[n])))
            for name in counts
        }
        tasks = {name: asyncio.create_task(site.run()) for name, site in sites.items()}
        await asyncio.sleep(2 * TELL_S + 1)
        counts["a"] = 2.0  # its own page is as of now
        found = samples(b"".join(sites["a"].parts()).decode())
        assert {key[1]: value for key, value in found.items() if key[0] == "requests_total"} == {"a": 2.0, "b": 5.0}
        tasks["b"].cancel()
        await asyncio.sleep(TTL_S + 2 * TELL_S)
        assert {key[1] for key in samples(b"".join(sites["a"].parts()).decode())} == {"a"}
        for task in tasks.values():
            task.cancel()

    run(main())
