"""Answers of the emulated server against answers recorded from vLLM 0.32.0: same status, same bytes but for texts."""

import json
import re
from pathlib import Path

import pytest

RECORDED = json.loads((Path(__file__).parent / "vllm_0_32_responses.json").read_text())


@pytest.fixture(scope="module")
def served(running_emulator):
    instance = running_emulator.start(gpus=[6, 7])
    yield instance
    instance.stop()


@pytest.fixture(scope="module")
def unhurried(running_emulator):
    """Steps so long that a late event loop does not merge two tokens into one chunk."""
    instance = running_emulator.start(gpus=[4, 5], profile="llama-3.1-70b-fp8-h100")
    instance.change("faults", faults={"slow_factor": 3.0})
    yield instance
    instance.stop()


def without_variables(text: str) -> str:
    text = re.sub(r'"(id|content|text|system_fingerprint|root)":"[^"]*"', r'"\1":"*"', text)
    return re.sub(r'"(created|prompt_tokens|total_tokens)":\d+', r'"\1":0', text)


@pytest.mark.parametrize("name", list(RECORDED["cases"]))
def test_answers_as_vllm_did(name, served, unhurried):
    case = RECORDED["cases"][name]
    instance = unhurried if "[DONE]" in case["body"] else served
    content = case["raw"] if "raw" in case else json.dumps(case["json"]) if "json" in case else None
    headers = {} if content is None else {"content-type": case.get("content_type", "application/json")}
    answer = instance.http.request(case["method"], case["path"], content=content, headers=headers)
    assert answer.status_code == case["status"]
    assert without_variables(answer.text) == case["body"]


def test_metrics_have_vllms_names_types_labels_and_buckets(served):
    from prometheus_client.parser import text_string_to_metric_families

    served.chat()
    families = {family.name: family for family in text_string_to_metric_families(served.http.get("/metrics").text)}
    not_emulated = re.compile("estimated_|prompt_tokens_cached_by_source|prefill_kv_computed|max_num_generation")
    for name, expected in RECORDED["metrics"].items():
        if not_emulated.search(name):
            continue
        # the parser takes the suffix off the counters' names
        family = families[name.removesuffix("_total") if expected["type"] == "counter" else name]
        assert family.type == expected["type"]
        labels = {label for sample in family.samples for label in sample.labels}
        if name != "vllm:cache_config_info":  # its labels are the configuration
            assert labels == set(expected["labels"])
        if "le" in expected:
            assert [s.labels["le"] for s in family.samples if "le" in s.labels] == expected["le"]
