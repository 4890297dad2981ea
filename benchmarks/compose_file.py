"""ComposeFile: the services of docker-compose.yml, and how each would run as a process on this machine.

Every service gets a loopback address of its own, so that ports stay what the file says: ``0.0.0.0`` becomes it, a
service's name before a port, or after ``=``, becomes that service's, a mounted path becomes where the mount stands
here. What containers add (users, capabilities, limits) is not rehearsed. Pure: text in, values out; reads and starts
nothing.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

_VARIABLE = re.compile(r"\$\$|\$\{(?P<name>\w+)(?::?-(?P<default>[^}]*))?\}")
_OWN = re.compile(r"(?<![\w.])(127\.0\.0\.1|localhost)(?![\w.])")


class ComposeError(ValueError):
    """The file says something that this reading of it does not know, at that key."""


@dataclass(frozen=True, slots=True)
class Mount:
    """``source``: a path beside the file (it begins with ``.``), or the name of a volume."""

    source: str
    target: PurePosixPath

    @property
    def is_volume(self) -> bool:
        """Whether it begins empty."""
        return not self.source.startswith((".", "/"))


@dataclass(frozen=True, slots=True)
class Service:
    """One service, as far as a process can show it."""

    name: str
    image: str  # "" where it is built
    target: str  # of the Dockerfile; "" for the last stage
    entrypoint: tuple[str, ...] | None
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...]
    waits_for: Mapping[str, str]  # service -> condition
    healthcheck: tuple[str, ...]  # empty: none
    profiles: tuple[str, ...]


def read_compose(text: str, variables: Mapping[str, str] | None = None) -> dict[str, Service]:
    """The services by name, started-before first. Raises ``ComposeError``."""
    document = yaml.safe_load(_interpolated(text, variables or {}))
    services = {name: _service(name, body) for name, body in document["services"].items()}
    return {name: services[name] for name in _in_order(services)}


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, default = found["name"], found["default"]
        if name not in variables and default is None:
            raise ComposeError(f"${{{name}}} has no value and no default")
        return variables.get(name) or default or ""

    return _VARIABLE.sub(value, text)


def _service(name: str, body: Mapping[str, Any]) -> Service:
    build = body.get("build", {})
    entrypoint = body.get("entrypoint")
    return Service(
        name=name,
        image=body.get("image", "") if not build else "",
        target=build.get("target", "") if isinstance(build, Mapping) else "",
        entrypoint=None if entrypoint is None else _words(entrypoint, f"services.{name}.entrypoint"),
        command=_words(body.get("command", []), f"services.{name}.command"),
        environment={key: str(value) for key, value in body.get("environment", {}).items()},
        mounts=tuple(_mount(text) for text in body.get("volumes", [])),
        waits_for={key: how["condition"] for key, how in body.get("depends_on", {}).items()},
        healthcheck=_healthcheck(name, body.get("healthcheck", {}).get("test", [])),
        profiles=tuple(body.get("profiles", ())),
    )


def _words(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ComposeError(f"{where}: write a list, so that no shell takes part")
    return tuple(map(str, value))


def _healthcheck(name: str, test: list[str]) -> tuple[str, ...]:
    if test and test[0] != "CMD":
        raise ComposeError(f"services.{name}.healthcheck.test: begin with CMD, so that no shell takes part")
    return tuple(test[1:])


def _mount(text: str) -> Mount:
    source, target, *_ = text.split(":")
    return Mount(source, PurePosixPath(target))


def _in_order(services: Mapping[str, Service]) -> list[str]:
    ordered: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ComposeError(f"services.{name}.depends_on: it waits for itself through {' -> '.join(above)}")
        if name not in services:
            raise ComposeError(f"services.{above[-1]}.depends_on: there is no service {name!r}")
        for before in services[name].waits_for:
            visit(before, (*above, name))
        if name not in ordered:
            ordered.append(name)

    for name in services:
        visit(name, ())
    return ordered


def dockerfile_entrypoint(text: str, target: str = "") -> tuple[str, ...]:
    """The ENTRYPOINT of a stage (the last, where none is named), in its exec form. Raises ``ComposeError``."""
    entrypoints: dict[str, tuple[str, ...]] = {}
    stage = ""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["FROM"]:
            stage = words[-1] if "AS" in words else f"stage-{len(entrypoints)}"
            entrypoints[stage] = entrypoints.get(words[1], ())
        elif words[:1] == ["ENTRYPOINT"]:
            entrypoints[stage] = tuple(json.loads(line.removeprefix("ENTRYPOINT")))
    found = entrypoints.get(target or stage, ())
    if not found:
        raise ComposeError(f"Dockerfile: stage {target or stage!r} has no ENTRYPOINT")
    return found


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the services of a rehearsal stand: an address for each, a local path for each mount."""

    addresses: Mapping[str, str]
    paths: Mapping[Mount, str]

    def command(self, service: Service, entrypoint: Iterable[str]) -> list[str]:
        """What is executed here: entry point and command."""
        return [self.located(word, service) for word in (*entrypoint, *service.command)]

    def healthcheck(self, service: Service) -> list[str]:
        """The health check; inside its container a service is at 127.0.0.1."""
        own = self.addresses[service.name]
        return [self.located(_OWN.sub(own, word), service) for word in service.healthcheck]

    def environment(self, service: Service) -> dict[str, str]:
        """The service's own variables."""
        return {name: self.located(value, service) for name, value in service.environment.items()}

    def located(self, text: str, service: Service) -> str:
        """A text of the file, or of a file it mounts, as it must read here."""
        for mount in sorted(service.mounts, key=lambda m: -len(str(m.target))):
            text = re.sub(rf"(?<![\w/.]){re.escape(str(mount.target))}(?=$|[/\s\"',])", self.paths[mount], text)
        text = text.replace("0.0.0.0", self.addresses[service.name])
        for name, address in self.addresses.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?=:\d)|(?<==){re.escape(name)}$", address, text)
        return text
