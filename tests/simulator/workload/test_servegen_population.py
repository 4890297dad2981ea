import numpy as np
import pytest

from simulator.workload.arrivals import WorkloadError
from simulator.workload.lengths import IndependentLengths, TokenHistogram
from simulator.workload.servegen import Client, ClientWindow, population


def exactly(input_tokens: int, output_tokens: int) -> IndependentLengths:
    one = np.ones(1)
    return IndependentLengths(
        TokenHistogram.of(np.array([float(input_tokens)]), one),
        TokenHistogram.of(np.array([float(output_tokens)]), one),
    )


STEADY = Client(1, {0: ClientWindow(600, "Gamma", 1.0), 2: ClientWindow(60, "Gamma", 1.0)}, {0.0: exactly(100, 10)})
BURSTY = Client(2, {0: ClientWindow(300, "Weibull", 0.4)}, {0.0: exactly(2000, 20)})
NAMELESS = Client(3, {0: ClientWindow(900, "Gamma", 2.0)}, {})


def test_each_window_holds_the_published_requests_of_each_client():
    workload = population("t", (STEADY, BURSTY), 600.0, 3, seed=0)
    arrivals = workload.collect()
    assert workload.expected_requests == len(arrivals) == 960
    assert workload.duration_s == 1800
    assert (arrivals.input_tokens == 2000).sum() == 300
    counts, _ = np.histogram(arrivals.arrival_s, [0, 600, 1200, 1800])
    assert counts.tolist() == [900, 0, 60]
    assert np.all(np.diff(arrivals.arrival_s) >= 0)


def test_scaling_multiplies_each_clients_requests():
    arrivals = population("t", (STEADY, BURSTY), 600.0, 3, seed=0, rate_scale=2.5).collect()
    assert len(arrivals) == 2400
    assert (arrivals.input_tokens == 2000).sum() == 750
    few = [len(population("t", (STEADY,), 600.0, 3, seed=seed, rate_scale=0.001).collect()) for seed in range(300)]
    assert np.mean(few) == pytest.approx(0.66, abs=0.12)


def test_a_client_without_lengths_takes_those_of_the_others_by_their_requests():
    arrivals = population("t", (STEADY, BURSTY, NAMELESS), 600.0, 1, seed=0).collect()
    borrowed = (arrivals.input_tokens == 2000).sum() - 300
    assert len(arrivals) == 1800
    assert borrowed == pytest.approx(300, abs=60)  # a third of its 900


def test_where_all_active_clients_are_without_lengths_anybodys_will_do():
    elsewhere = Client(1, {5: ClientWindow(1, "Gamma", 1.0)}, {0.0: exactly(7, 8)})
    arrivals = population("t", (elsewhere, NAMELESS), 600.0, 1, seed=0).collect()
    assert set(arrivals.input_tokens) == {7}
    assert len(arrivals) == 900


def test_lengths_hold_from_their_time_on_and_the_first_before_it():
    client = Client(1, {}, {600.0: exactly(5, 5), 1200.0: exactly(9, 9)})

    def tokens(time_s: float) -> int:
        lengths = client.lengths_at(time_s)
        assert lengths is not None
        return int(lengths.sample(np.random.default_rng(0), 1)[0][0])

    assert [tokens(time_s) for time_s in (0.0, 600.0, 1199.0, 1200.0, 9e9)] == [5, 5, 5, 9, 9]


def test_bursty_clients_stay_bursty():
    def cv(client: Client) -> float:
        gaps = np.diff(population("t", (client,), 600.0, 1, seed=1).collect().arrival_s)
        return float(gaps.std() / gaps.mean())

    assert cv(STEADY) == pytest.approx(1, abs=0.15)
    assert cv(BURSTY) > 2


def test_the_same_seed_gives_the_same_stream():
    one, same, other = (population("t", (STEADY, NAMELESS), 600.0, 1, seed).collect() for seed in (1, 1, 2))
    assert np.array_equal(one.arrival_s, same.arrival_s)
    assert np.array_equal(one.input_tokens, same.input_tokens)
    assert not np.array_equal(one.arrival_s, other.arrival_s)


def test_no_lengths_at_all_and_no_rate_are_refused():
    with pytest.raises(WorkloadError, match="length histogram"):
        population("t", (NAMELESS,), 600.0, 1, seed=0)
    with pytest.raises(WorkloadError, match="rate scale"):
        population("t", (STEADY,), 600.0, 1, seed=0, rate_scale=0)
