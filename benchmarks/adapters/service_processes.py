"""ServiceProcesses: the services of a compose file as processes here, each at a loopback address of its own.

Mounted files are copied with their addresses put in; volumes are empty folders. Whatever is started is stopped on the
way out, by its own process group, and nothing else is touched.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compose_file import ComposeError, Mount, Service, Stage, dockerfile_entrypoint

HEALTHY_WITHIN_S = 90.0
POLL_S = 0.5
STOPPED_WITHIN_S = 40.0
# What images that are not ours start, and what stands for it here
IMAGE_ENTRYPOINTS: Mapping[str, tuple[str, ...]] = {"redis": (), "prom/prometheus": ("prometheus",)}


class ServiceFailedError(Exception):
    """A service did not come up, or did not end well; the message says which, and where its log is."""


@dataclass(slots=True)
class Running:
    """One service as a process."""

    service: Service
    argv: list[str]
    process: subprocess.Popen[bytes]
    log: Path


class ServiceProcesses:
    """Use ``started``."""

    def __init__(self, services: Mapping[str, Service], root: Path, folder: Path, subnet: str) -> None:
        """``root``: where docker-compose.yml stands; ``subnet``: three octets of loopback addresses, ``127.x.y``."""
        self.services = dict(services)
        self.running: dict[str, Running] = {}
        self._root = root
        self._folder = folder
        addresses = {name: f"{subnet}.{number}" for number, name in enumerate(self.services, start=1)}
        mounts = [mount for service in self.services.values() for mount in service.mounts]
        paths = {mount: str(folder / "mounts" / mount.source.strip("./").replace("/", "-")) for mount in mounts}
        self.stage = Stage(addresses, paths)

    def start(self, name: str) -> Running:
        """Start one service and wait until its health check passes. Raises ``ServiceFailedError``."""
        service = self.services[name]
        for mount in service.mounts:
            self._lay(mount, service)
        argv = self._here(self.stage.command(service, self._entrypoint(service)))
        log = self._folder / f"{name}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                cwd=self._folder,
                env={**os.environ, "PYTHONPATH": str(self._root), **self.stage.environment(service)},
            )
        self.running[name] = running = Running(service, argv, process, log)
        self._await_health(running)
        return running

    def _entrypoint(self, service: Service) -> tuple[str, ...]:
        if service.entrypoint is not None:
            return service.entrypoint
        if not service.image:
            return dockerfile_entrypoint((self._root / "Dockerfile").read_text(), service.target)
        try:
            return IMAGE_ENTRYPOINTS[service.image.partition(":")[0]]
        except KeyError:
            raise ComposeError(
                f"services.{service.name}.image: what {service.image} starts is not known here"
            ) from None

    def _lay(self, mount: Mount, service: Service) -> None:
        """Put a mount where the stage says, addresses filled in."""
        here = Path(self.stage.paths[mount])
        here.parent.mkdir(parents=True, exist_ok=True)
        if mount.is_volume:
            here.mkdir(exist_ok=True)
            return
        source = self._root / mount.source
        files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
        for path in files:
            to = here / path.relative_to(source) if source.is_dir() else here
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(self.stage.located(path.read_text(), service))

    @staticmethod
    def _here(argv: list[str]) -> list[str]:
        first, *rest = argv
        if first == "dynamollm":
            return [sys.executable, "-m", "dynamollm", *rest]
        found = sys.executable if first == "python" else shutil.which(Path(first).name)
        if found is None:
            raise ServiceFailedError(f"{first} is not installed here (Debian: apt-get install redis prometheus)")
        return [found, *rest]

    def _await_health(self, running: Running) -> None:
        if not running.service.healthcheck:
            return
        check = self._here(self.stage.healthcheck(running.service))
        until_s = time.monotonic() + HEALTHY_WITHIN_S
        while time.monotonic() < until_s:
            if running.process.poll() is not None:
                raise self._failed(running, f"ended with status {running.process.returncode}")
            if subprocess.run(check, capture_output=True, timeout=30, check=False).returncode == 0:
                return
            time.sleep(POLL_S)
        raise self._failed(running, f"was not healthy within {HEALTHY_WITHIN_S:g} s")

    def stop(self, name: str) -> int:
        """Stop one service as ``docker compose stop`` does; its exit status. Raises ``ServiceFailedError``."""
        running = self.running.pop(name)
        running.process.send_signal(signal.SIGTERM)
        try:
            return running.process.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            raise self._failed(running, f"did not stop within {STOPPED_WITHIN_S:g} s of SIGTERM") from None
        finally:
            self._kill(running)

    def close(self) -> None:
        """End whatever is left."""
        for running in self.running.values():
            self._kill(running)
        self.running.clear()

    @staticmethod
    def _kill(running: Running) -> None:
        try:
            os.killpg(running.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        running.process.wait()

    @staticmethod
    def _failed(running: Running, what: str) -> ServiceFailedError:
        end = running.log.read_text(errors="replace")[-2000:]
        return ServiceFailedError(f"service {running.service.name} {what}: {' '.join(running.argv)}\n{end}")


@contextmanager
def started(services: Mapping[str, Service], root: Path, folder: Path, subnet: str) -> Iterator[ServiceProcesses]:
    """All services up, in their order; none left afterwards. Raises ``ServiceFailedError``."""
    processes = ServiceProcesses(services, root, folder, subnet)
    try:
        for name in services:
            processes.start(name)
        yield processes
    finally:
        processes.close()
