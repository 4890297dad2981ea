"""How one ``vllm serve`` process is started: command line and environment, from values. Starts nothing itself.

An instance of tensor parallelism k sees its k GPUs by ``CUDA_VISIBLE_DEVICES``. The variables under ``MARK`` and
``CONTROLLER`` say whose process it is, and the one under ``RECORD`` what it was started as, for whoever looks for
orphans (``vllm_orphans``).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pools.drivers.port import InstanceSpec

NODE = "DYNAMOLLM_NODE"
MARK = "DYNAMOLLM_INSTANCE"
CONTROLLER = "DYNAMOLLM_CONTROLLER"
RECORD = "DYNAMOLLM_ENGINE"
DRAIN_LIMIT_S = 86_400  # vLLM's own limit; the driver ends a drain sooner, with its grace


@dataclass(frozen=True, slots=True)
class VllmModel:
    """Where a served model's weights are (a directory or a Hub name), and what its engines are told beyond that."""

    path: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VllmLaunch:
    """What all instances have in common."""

    command: tuple[str, ...] = ("vllm",)
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    splits_model: bool = True  # False: the engine itself makes its TP up (an emulated device), and is not told of it
    can_park: bool = True  # opens vLLM's development endpoints, which put an engine to sleep


def command_line(launch: VllmLaunch, model: VllmModel, spec: InstanceSpec, port: int) -> list[str]:
    """The words to execute. What an operator adds comes last, so that it wins."""
    words = [*launch.command, "serve", model.path, "--served-model-name", spec.shape.model]
    words += ["--host", launch.host, "--port", str(port), "--shutdown-timeout", str(DRAIN_LIMIT_S)]
    words += ["--enable-server-load-tracking", "--enable-request-id-headers"]
    if launch.splits_model:
        words += ["--tensor-parallel-size", str(spec.shape.tp)]
        words += ["--enable-sleep-mode"] if launch.can_park else []
    return [*words, *launch.arguments, *model.arguments]


def environment(
    launch: VllmLaunch, model: VllmModel, spec: InstanceSpec, controller: str, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The process's environment: what this one has, the launch's, the model's, then what makes it this instance."""
    own = {
        "CUDA_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in spec.gpus),
        "VLLM_NO_USAGE_STATS": "1",
        **({"VLLM_SERVER_DEV_MODE": "1"} if launch.can_park else {}),
        NODE: spec.gpus[0].node,
        MARK: spec.id,
        CONTROLLER: controller,
    }
    return {**inherited, **launch.environment, **model.environment, **own}


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What an engine was started as; its environment holds it as JSON, so that no file of it can be stale."""

    spec: InstanceSpec
    port: int
    log_path: str
    digest: str  # of all it was told

    def text(self) -> str:
        """As JSON; ``read_record`` reads it."""
        return msgspec.json.encode(self).decode()


def record_of(launch: VllmLaunch, model: VllmModel, spec: InstanceSpec, port: int, log_path: Path) -> EngineRecord:
    """The record of an engine that is started so; equal ones are the same engine of the same deployment.

    Two deployments on one machine differ in where their logs are, if in nothing else.
    """
    told = (command_line(launch, model, spec, port), launch.environment, model.environment)
    digest = hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()
    return EngineRecord(spec, port, str(log_path), digest)


def read_record(text: str) -> EngineRecord | None:
    """What ``EngineRecord.text`` has written; None for anything else."""
    try:
        return msgspec.json.decode(text, type=EngineRecord)
    except msgspec.DecodeError:
        return None
