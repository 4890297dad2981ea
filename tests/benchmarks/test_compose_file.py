"""A compose file read as processes: what is executed, where things stand, and what is refused."""

from pathlib import PurePosixPath

import pytest

from benchmarks.compose_file import ComposeError, Mount, Stage, dockerfile_entrypoint, read_compose

TEXT = """
x-common: &common
  image: redis:7
services:
  front:
    build: {context: ., target: runtime}
    command: [gateway, --config, /etc/front/a.yaml, --host=0.0.0.0, "--peer=http://back:80", redis://redis:6379/0]
    environment: {PEER: "http://back:80", LEVEL: "${LEVEL:-info}", COST: "$$5"}
    volumes: ["./deploy/a.yaml:/etc/front/a.yaml:ro", "state:/var/lib"]
    depends_on:
      back: {condition: service_healthy}
      redis: {condition: service_started}
    healthcheck: {test: [CMD, probe, "http://127.0.0.1:8080/ready", front]}
  back:
    <<: *common
    entrypoint: [server, --host=back]
    command: [--root, /var/lib/back]
    profiles: [gpu]
  redis:
    <<: *common
"""


@pytest.fixture
def services():
    return read_compose(TEXT, {})


@pytest.fixture
def stage(services):
    addresses = {"front": "127.1.1.1", "back": "127.1.1.2", "redis": "127.1.1.3"}
    paths = {mount: f"/here/{mount.source.strip('./')}" for each in services.values() for mount in each.mounts}
    return Stage(addresses, paths)


def test_services_come_after_those_they_wait_for(services):
    names = list(services)
    assert names.index("front") > max(names.index("back"), names.index("redis"))
    assert services["front"].waits_for == {"back": "service_healthy", "redis": "service_started"}


def test_merged_keys_profiles_and_built_images_are_read(services):
    assert services["back"].image == services["redis"].image == "redis:7"
    assert services["back"].profiles == ("gpu",)
    assert (services["front"].image, services["front"].target) == ("", "runtime")
    assert services["redis"].healthcheck == ()


def test_mounts_are_files_of_ours_or_volumes(services):
    ours, volume = services["front"].mounts
    assert ours == Mount("./deploy/a.yaml", PurePosixPath("/etc/front/a.yaml"))
    assert (ours.is_volume, volume.is_volume) == (False, True)


def test_a_command_is_what_the_container_would_run_with_our_addresses_and_paths(services, stage):
    assert stage.command(services["front"], ["dynamollm"]) == [
        "dynamollm",
        "gateway",
        "--config",
        "/here/deploy/a.yaml",
        "--host=127.1.1.1",
        "--peer=http://127.1.1.2:80",
        "redis://127.1.1.3:6379/0",
    ]


def test_a_name_after_an_equals_sign_is_an_address_and_a_subcommand_is_not(services, stage):
    assert stage.command(services["back"], services["back"].entrypoint) == [
        "server",
        "--host=127.1.1.2",
        "--root",
        "/var/lib/back",  # that mount is another service's
    ]
    assert stage.located("back", services["back"]) == "back"


def test_a_health_check_asks_its_own_container(services, stage):
    assert stage.healthcheck(services["front"]) == ["probe", "http://127.1.1.1:8080/ready", "front"]


def test_variables_take_their_defaults_and_a_doubled_dollar_is_one(services, stage):
    assert stage.environment(services["front"]) == {"PEER": "http://127.1.1.2:80", "LEVEL": "info", "COST": "$5"}
    assert read_compose(TEXT, {"LEVEL": "debug"})["front"].environment["LEVEL"] == "debug"


def test_names_inside_other_words_stay(services, stage):
    for text in ("feedback:80", "front-end:80", "my.back:80", "backs:80"):
        assert stage.located(text, services["redis"]) == text


def test_a_mounted_folder_covers_what_is_under_it_and_no_longer_name(services, stage):
    assert stage.located("/var/lib/x", services["front"]) == "/here/state/x"
    assert stage.located("/var/library/x", services["front"]) == "/var/library/x"
    assert stage.located("/srv/var/lib", services["front"]) == "/srv/var/lib"


@pytest.mark.parametrize(
    ("services_text", "said"),
    [
        ("a: {image: x, command: run me}", "services.a.command: write a list"),
        ("a: {image: x, healthcheck: {test: [CMD-SHELL, x]}}", "services.a.healthcheck.test: begin with CMD"),
        ("a: {image: x, depends_on: {b: {condition: service_started}}}", "there is no service 'b'"),
        ("a: {image: x, command: ['${NOT_SET}']}", r"\$\{NOT_SET\} has no value"),
        (
            "a: {image: x, depends_on: {b: {condition: c}}}\n  b: {image: x, depends_on: {a: {condition: c}}}",
            "waits for itself through a -> b",
        ),
    ],
)
def test_what_this_reading_does_not_know_is_refused_with_its_key(services_text, said):
    with pytest.raises(ComposeError, match=said):
        read_compose(f"services:\n  {services_text}\n", {})


DOCKERFILE = """
FROM python:3 AS build
ENTRYPOINT ["pip"]
FROM python:3 AS runtime
ENTRYPOINT ["dynamollm", "-v"]
FROM runtime AS more
RUN true
"""


def test_an_entrypoint_is_its_stage_s_or_that_of_the_stage_it_comes_from():
    assert dockerfile_entrypoint(DOCKERFILE, "build") == ("pip",)
    assert dockerfile_entrypoint(DOCKERFILE, "runtime") == ("dynamollm", "-v")
    assert dockerfile_entrypoint(DOCKERFILE) == ("dynamollm", "-v")
    with pytest.raises(ComposeError, match="stage 'none' has no ENTRYPOINT"):
        dockerfile_entrypoint(DOCKERFILE, "none")
