"""EmulatedDeviceWorker: what ``vllm serve --worker-cls`` loads; a CPU worker whose steps last as on the GPUs emulated.

The small model really runs, so that all of vLLM is real: API server, scheduler, KV blocks, sampling, metrics. A step
quicker than the profile's waits; one that is slower is late, so the model must be small beside the profile's steps.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from energy.profile import GpuState
from simulator.vllm_device.adapters.device import EmulatedDevice
from simulator.vllm_device.batches import Batch, Batches


class EmulatedDeviceWorker(CPUWorker):  # type: ignore[misc]  # vLLM is not there where types are checked
    """See the module."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._emulated = EmulatedDevice.of_environment()
        self._batches = Batches()

    def determine_available_memory(self) -> int:
        """Bytes of KV cache that hold as many tokens as the GPUs emulated would; paid for as they are used."""
        bytes_per_token = sum(spec.page_size_bytes / spec.block_size for spec in self.get_kv_cache_spec().values())
        return int(self._emulated.kv_capacity_tokens * bytes_per_token)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run the batch, and return when the emulated GPUs would."""
        if scheduler_output.total_num_scheduled_tokens == 0:
            return super().execute_model(scheduler_output)
        due_s = self._emulated.begin_step(self._batch_of(scheduler_output))
        output = super().execute_model(scheduler_output)
        self._emulated.end_step(due_s)
        return output

    def _batch_of(self, scheduled: Any) -> Batch:
        new, running = scheduled.scheduled_new_reqs, scheduled.scheduled_cached_reqs
        computed = dict(zip(running.req_ids, running.num_computed_tokens, strict=True))
        computed |= {request.req_id: request.num_computed_tokens for request in new}
        return self._batches.step(
            {request.req_id: len(request.prompt_token_ids or ()) for request in new},
            computed,
            scheduled.num_scheduled_tokens,
            scheduled.finished_req_ids,
        )

    def sleep(self, level: int = 1) -> None:
        """Power as of a parked GPU."""
        self._emulated.enter(GpuState.PARKED)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Power as of a loaded GPU."""
        self._emulated.enter(GpuState.LOADED)
