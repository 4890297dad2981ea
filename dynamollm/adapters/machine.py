"""What ``dynamollm doctor`` finds out about this machine. Reads only; never sets a clock, never starts anything."""

import importlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

from dynamollm.diagnosis import Finding, Verdict, cores_finding, open_files_finding, python_finding
from simulator.workload.adapters.location import ORIGINS, data_file, data_folders
from simulator.workload.arrivals import WorkloadError


def machine_findings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Everything about the machine itself."""
    yield python_finding(sys.version_info[:3], sys.prefix != sys.base_prefix)
    yield cores_finding(_cores())
    yield from _open_files()
    yield nvml_finding()
    yield redis_finding(shutil.which("redis-server") or shutil.which("valkey-server"))
    yield data_finding(environ)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _open_files() -> Iterator[Finding]:
    try:
        import resource
    except ImportError:  # not POSIX
        return
    yield open_files_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))


def nvml_finding(nvml: ModuleType | None = None) -> Finding:
    """GPUs as NVML tells them; ``nvml`` is the pynvml module unless given."""
    nvml = nvml or importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        fix = "nothing to do for an emulated cluster; for real GPUs install NVIDIA's driver"
        return Finding("gpus", Verdict.NOTE, f"none: {error}", fix)
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        names = [_text(nvml.nvmlDeviceGetName(handle)) for handle in handles]
    except nvml.NVMLError as error:
        return Finding("gpus", Verdict.WARN, f"NVML answers, its devices do not: {error}", "see nvidia-smi and dmesg")
    finally:
        nvml.nvmlShutdown()
    if not names:
        return Finding("gpus", Verdict.NOTE, "NVIDIA's driver is there, no GPU is")
    found = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    if os.geteuid() != 0:
        fix = "SM clocks can be set as root only: run the node agent for that"
        return Finding("gpus", Verdict.NOTE, f"{found}; not root", fix)
    return Finding("gpus", Verdict.OK, found)


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def redis_finding(path: str | None) -> Finding:
    """Whether a Redis server is installed here."""
    if path is None:
        return Finding("redis", Verdict.NOTE, "no redis-server here", "needed only where several gateways share state")
    return Finding("redis", Verdict.OK, path)


def data_finding(environ: Mapping[str, str]) -> Finding:
    """Which of the public data files are at hand."""
    missing = []
    for relative in ORIGINS:
        try:
            data_file(relative, environ)
        except WorkloadError:
            missing.append(relative.rpartition("/")[2])
    folder = data_folders(environ)[0]
    if missing:
        found = f"{len(ORIGINS) - len(missing)} of {len(ORIGINS)} public traces in {folder}"
        fix = f"missing {', '.join(missing)}; synthetic workloads need none. Set DYNAMOLLM_DATA to where they are"
        return Finding("public data", Verdict.NOTE, found, fix)
    return Finding("public data", Verdict.OK, f"all {len(ORIGINS)} public traces in {folder}")


def port_finding(host: str, port: int) -> Finding:
    """Whether the gateway's port is free."""
    subject = f"port {port}"
    try:
        with socket.create_server((host, port)):
            return Finding(subject, Verdict.OK, f"free on {host}")
    except OSError as error:
        fix = "stop what listens there, or set server.port; to check a running gateway pass --url"
        return Finding(subject, Verdict.FAIL, f"cannot be bound on {host}: {error.strerror or error}", fix)
