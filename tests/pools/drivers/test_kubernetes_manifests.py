"""deploy/kubernetes: valid by the API's own schemas, no right too few or too many, commands that are ours."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_examples import kubernetes_cluster, kubernetes_driver
from test_kubernetes_driver import ready, spec

from dynamollm.adapters.configuration import load
from dynamollm.cli import group
from pools.drivers import kubernetes_objects as objects
from pools.drivers.kubernetes_intents import ClockIntents
from pools.drivers.kubernetes_objects import PodTemplate
from pools.drivers.vllm_launch import VllmLaunch, VllmModel

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
GROUPS = {"": "", "apps": "apps", "coordination.k8s.io": "coordination.k8s.io"}


def documents() -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    return [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((FOLDER / name).read_text())
        if document
    ]


def check(document: dict[str, Any]) -> None:
    """By the client's models: types and required fields; what they do not know comes back as missing."""
    from kubernetes.aio.client import models

    version = document["apiVersion"].rpartition("/")[2].capitalize()
    model = getattr(models, f"{version}{document['kind']}")
    assert_same(document, model.from_dict(document).model_dump(by_alias=True, exclude_none=True), document["kind"])


def assert_same(given: Any, back: Any, path: str) -> None:
    if isinstance(given, dict):
        for key, value in given.items():
            assert key in back, f"{path}.{key} is not a field of its kind"
            assert_same(value, back[key], f"{path}.{key}")
    elif isinstance(given, list):
        assert len(given) == len(back), path
        for index, value in enumerate(given):
            assert_same(value, back[index], f"{path}[{index}]")
    else:
        assert str(given) == str(back), path


@pytest.mark.parametrize("document", documents(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_manifests_are_valid_and_need_nothing_newer_than_1_20(document):
    assert document["apiVersion"] in ("v1", "apps/v1", "rbac.authorization.k8s.io/v1")
    check(document)


@pytest.mark.parametrize("gpu_resource", ["nvidia.com/gpu", None])
def test_what_the_driver_writes_is_valid_too(gpu_resource):
    template = PodTemplate("prod", "vllm", VllmLaunch(host="0.0.0.0"), gpu_resource=gpu_resource, service_account="x")
    model = VllmModel("org/model", ("--max-model-len", "4096"), {"HF_HOME": "/cache"})
    deployment = objects.deployment(template, model, spec("a"))
    check(deployment)
    check(objects.heartbeat("prod", 7, 30))
    limits = deployment["spec"]["template"]["spec"]["containers"][0].get("resources", {}).get("limits")
    assert limits == ({"nvidia.com/gpu": "2"} if gpu_resource else None)


def test_a_schema_check_sees_a_field_that_is_not_one():
    (service,) = (document for document in documents() if document["kind"] == "Service")
    service["spec"]["port"] = 80
    with pytest.raises(AssertionError, match=r"Service.spec.port is not a field"):
        check(service)


def rights(*roles: str) -> set[tuple[str, str]]:
    return {
        (verb, resource)
        for document in documents()
        if document["kind"] in ("Role", "ClusterRole") and document["metadata"]["name"] in roles
        for rule in document["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_the_roles_allow_what_is_asked_and_nothing_else():
    async def scenario() -> None:
        async with kubernetes_cluster() as cluster:
            driver = kubernetes_driver(cluster)
            try:
                cluster.server.refuse("PATCH", r"/pods/[^/]+$", 409)
                await driver.start(spec("a"))
                await ready(driver, "a")
                await driver.set_sm_clock("a", 900)
                await driver.stop("a", 0.5)
                asked = set(cluster.server.asked)
                leadership = {("update", "leases"), ("get", "leases")}  # controller.leadership: kubernetes
                assert asked | leadership == rights("dynamollm", "dynamollm-nodes")
                cluster.server.asked.clear()
                intents = ClockIntents(driver._api, "node-0", "test", list, lambda: 0.0, dict)
                watching, driver._tasks = driver._tasks, [asyncio.create_task(asyncio.sleep(0))]
                for task in watching:
                    task.cancel()
                await asyncio.gather(*watching, return_exceptions=True)
                cluster.server.asked.clear()
                await intents.round()
                assert cluster.server.asked == rights("dynamollm-agent")
            finally:
                await driver.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_the_configuration_is_one_and_the_commands_are_ours():
    settings = load(FOLDER / "cluster.yaml", {})
    assert settings.driver.kind == "kubernetes"
    words = re.findall(r"command: \[dynamollm, ([a-z-]+)", "\n".join(f.read_text() for f in FOLDER.glob("*.yaml")))
    assert sorted(words) == ["agent", "intents", "serve"]
    for document in documents():
        for container in document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            command = group.get_command(None, container["command"][1])  # type: ignore[arg-type]
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in container["command"][2:] if word.startswith("--")} <= options
