"""The control endpoint and the node agents: what they start, refuse and tell."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from conftest import chat_body

from energy.adapters.catalogue import load_fitted, save_fitted
from energy.gpus import gpu_physics

H100 = gpu_physics("H100-SXM")


def test_two_engines_on_one_gpu_are_refused(emulator):
    emulator.start(gpus=[0, 1])
    answer = emulator.ask(gpus=[1, 2])
    assert (answer.status_code, answer.json()["error"]) == (409, "gpu-busy")
    assert emulator.ask(gpus=[2, 3]).status_code == 201


@pytest.mark.parametrize(
    ("options", "status", "kind", "says"),
    [
        ({"node": "node-9"}, 404, "unknown-gpu", "node-9"),
        ({"gpus": [7, 8]}, 404, "unknown-gpu", "0..7"),
        ({"tp": 4}, 422, "refused", "tp 4 needs 4"),
        ({"gpus": [0, 0]}, 422, "refused", "different"),
        ({"gpus": [0, 1, 2]}, 422, "refused", "TP 2, 4, 8"),
        ({"profile": "no-such-profile"}, 422, "refused", "no-such-profile"),
        ({"tokenizer_file": "/no/such/tokenizer.json"}, 422, "refused", "tokenizer.json"),
        ({"colour": "red"}, 422, "refused", "colour"),
    ],
)
def test_what_cannot_start_holds_no_gpu(emulator, options, status, kind, says):
    answer = emulator.ask(**options)
    assert (answer.status_code, answer.json()["error"]) == (status, kind)
    assert says in answer.json()["message"]
    assert emulator.ask(gpus=[0, 1]).status_code == 201


def test_a_port_in_use_is_refused_and_its_gpus_are_free(emulator):
    instance = emulator.start(gpus=[0, 1])
    port = int(instance.url.rsplit(":", 1)[1])
    answer = emulator.ask(gpus=[2, 3], port=port)
    assert answer.status_code == 409
    assert "cannot listen" in answer.json()["message"]
    assert emulator.ask(gpus=[2, 3]).status_code == 201


def test_the_context_is_cut_to_what_the_kv_cache_holds(emulator):
    described = emulator.ask(max_model_len=100_000_000).json()
    assert 10_000 < described["max_model_len"] < 100_000_000


def test_events_tell_every_state_in_order(emulator):
    with emulator.control.stream("GET", "/events") as answer:
        lines = answer.iter_lines()
        instance = emulator.start()
        instance.change("park")
        instance.change("wake")
        instance.change("faults", kill=True)
        told = []
        for line in lines:
            event = json.loads(line)
            if event["id"] == instance.id:
                told.append(event["state"])
            if event["state"] == "failed":
                break
    assert told == ["starting", "ready", "parked", "ready", "failed"]
    assert event["reason"] == "process died"


def test_a_clock_set_at_the_agent_slows_the_engine(emulator):
    instance = emulator.start()

    def decode_s() -> float:
        before = instance.metric("vllm:request_decode_time_seconds_sum")
        instance.chat(max_tokens=100)
        return instance.metric("vllm:request_decode_time_seconds_sum") - before

    fast_s = decode_s()
    query = {"gpu_ids": "1", "min_clock_mhz": 345, "max_clock_mhz": 345, "block": "true"}
    assert emulator.agent.post("/gpu/set_gpu_locked_clocks", params=query).status_code == 200
    assert instance.state()["sm_clock_mhz"] == 345  # the slowest of its GPUs
    assert decode_s() > 1.2 * fast_s
    assert emulator.agent.post("/gpu/reset_locked_clocks", params={"gpu_ids": "1"}).status_code == 200
    assert instance.state()["sm_clock_mhz"] == 1980


@pytest.mark.parametrize(
    "query",
    [
        {},
        {"gpu_ids": "x", "min_clock_mhz": 1200, "max_clock_mhz": 1200},
        {"gpu_ids": "9", "min_clock_mhz": 1200, "max_clock_mhz": 1200},
        {"gpu_ids": "0", "max_clock_mhz": 1200},
        {"gpu_ids": "0", "min_clock_mhz": 1300, "max_clock_mhz": 1200},
    ],
)
def test_a_wrong_query_changes_no_clock(emulator, query):
    answer = emulator.agent.post("/gpu/set_gpu_locked_clocks", params=query)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert 'gpu="0"' in emulator.agent.get("/metrics").text
    clocks = [line for line in emulator.agent.get("/metrics").text.splitlines() if "SM_CLOCK{" in line]
    assert all(line.endswith(" 1980") for line in clocks)


def test_serving_draws_more_than_idling_and_parking_less(emulator):
    instance = emulator.start()

    def power_w() -> float:
        return emulator.agent.get("/gpu/get_power", params={"gpu_ids": "0"}).json()["power_mw"]["0"] / 1000

    def energy_mj() -> int:
        return emulator.agent.get("/gpu/get_cumulative_energy", params={"gpu_ids": "0"}).json()["0"]["energy_mj"]

    idle_w = power_w()
    assert idle_w == pytest.approx(H100.loaded_w, rel=0.01)
    before_mj = energy_mj()
    instance.chat(max_tokens=1500)
    assert power_w() > idle_w + 20
    assert energy_mj() > before_mj
    instance.change("park")
    assert instance.state()["sm_clock_mhz"] == H100.min_clock_mhz
    instance.change("wake")
    assert instance.state()["sm_clock_mhz"] == H100.max_clock_mhz


def test_parking_waits_for_what_runs_and_waking_for_the_parking(emulator):
    instance = emulator.start()
    with ThreadPoolExecutor(3) as threads:
        with instance.http.stream(
            "POST", "/v1/chat/completions", json=chat_body(max_tokens=800, stream=True)
        ) as answer:
            parking = threads.submit(instance.change, "park")
            waking = threads.submit(instance.change, "wake")
            assert '"finish_reason":"length"' in answer.read().decode()
        parking.result(10)
        waking.result(10)
    assert instance.state()["state"] in ("ready", "parked")  # whichever came first
    instance.change("wake")
    assert (instance.state()["state"], instance.state()["sm_clock_mhz"]) == ("ready", 1980)
    assert instance.chat().status_code == 200


def test_one_that_is_stopped_while_it_parks_does_not_slow_its_gpus_next_owner(emulator):
    instance = emulator.start()
    long = chat_body(max_tokens=4000, stream=True)
    with ThreadPoolExecutor(1) as threads, instance.http.stream("POST", "/v1/chat/completions", json=long):
        parking = threads.submit(emulator.control.post, f"/instances/{instance.id}/park", json={})
        instance.stop()
        parking.result(10)
    assert emulator.start().state()["sm_clock_mhz"] == 1980


def test_a_node_can_be_switched_off_only_when_it_is_empty(emulator):
    emulator.start()
    assert emulator.control.post("/nodes/node-0/power", json={"on": False}).status_code == 409
    assert emulator.control.post("/nodes/node-1/power", json={"on": False}).status_code == 200
    assert emulator.ask(node="node-1").json()["error"] == "unknown-gpu"
    assert 'hostname="node-1"' not in emulator.control.get("/metrics").text
    assert emulator.control.post("/nodes/node-1/power", json={"on": True}).status_code == 200
    assert emulator.control.post("/nodes/node-9/power", json={"on": True}).status_code == 404


def test_what_is_not_there_is_a_404(emulator):
    assert emulator.control.delete("/instances/i-none").json()["error"] == "unknown-instance"
    assert emulator.control.post("/instances/i-none/park").status_code == 404
    assert emulator.control.get("/nowhere").status_code == 404
    assert emulator.agent.get("/nowhere").status_code == 404
    instance = emulator.start()
    assert emulator.control.post(f"/instances/{instance.id}/dance", json={}).status_code == 404
    assert emulator.control.delete(f"/instances/{instance.id}?grace_s=soon").status_code == 422


def test_a_tokenizer_file_counts_exactly(emulator, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0, "Hello": 1, "there": 2, "<|im_start|>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    instance = emulator.start(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert instance.http.post("/tokenize", json={"prompt": "Hello there"}).json()["tokens"] == [1, 2]
    usage = instance.chat().json()["usage"]
    counted = instance.http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello there"}]}).json()
    assert usage["prompt_tokens"] == counted["count"]
    answer = instance.http.post("/v1/completions", json={"prompt": [7]})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "Token id 7 is out of vocabulary")


def test_a_kv_cache_that_is_too_small_preempts_and_says_so(emulator, fast_profile, tmp_path):
    fitted = load_fitted(fast_profile)
    small = tmp_path / "small.yaml"
    save_fitted(replace(fitted, kv_capacity=dict.fromkeys(fitted.kv_capacity, 1024)), small)
    instance = emulator.start(profile=str(small))
    assert instance.described["max_model_len"] == 1024
    body = chat_body(max_tokens=600)
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: instance.http.post("/v1/chat/completions", json=body), range(3)))
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [600] * 3
    preempted = instance.metric("vllm:num_preemptions_total")
    assert preempted >= 1
    assert instance.metric("vllm:request_num_preemptions_sum") == preempted
    assert instance.metric("vllm:prompt_tokens_total") == 3 * 13  # recomputing does not count
