"""Engine: the EngineModel one step at a time, for real time.

One vLLM server's engine: sequences come and go, each step takes the time and the power its EnergyProfile coefficients
give for the batch that ``simulator.batching`` schedules. Virtual time (``simulator.kernel``) runs the very same
scheduling functions compiled. Never reads a clock and never sleeps: whoever drives it is given each step's duration.

Invariant: submitted = finished + aborted + in flight.
"""

from dataclasses import dataclass

from energy.profile import StepCoefficients, step_power_w, step_time_s
from simulator.batching import (
    NO_SLOT,
    BatchState,
    EngineLimits,
    Ints,
    complete,
    drop_running,
    enqueue,
    release,
    schedule,
    unlink_waiting,
)

__all__ = ["Engine", "EngineLimits", "RequestTooLongError", "Step", "StepResult"]


class RequestTooLongError(ValueError):
    """A request can never fit the engine's KV cache, however long it waits."""


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step that has begun: how long it takes and what each GPU draws meanwhile."""

    duration_s: float
    power_w: float  # per GPU
    prefill_tokens: int
    decode_seqs: int
    context_tokens: int
    preempted: tuple[int, ...]  # request ids thrown back to the queue to make room
    admitted: tuple[int, ...]  # request ids that joined the batch, for the first time or again


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced, as request ids; every finished one is also among the emitted."""

    emitted: tuple[int, ...]
    finished: tuple[int, ...]


class Engine:
    """The engine of one instance in real time: ``start_step``, wait its duration, ``finish_step``, again."""

    def __init__(self, limits: EngineLimits, coefficients: StepCoefficients) -> None:
        self.limits = limits
        self._coefficients = coefficients
        self._requests: list[int] = []  # request id by slot
        self._slots: dict[int, int] = {}  # slot by request id
        self._free_slots: list[int] = []
        self._in_step = False
        self._state: BatchState = _empty_state(limits)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return self._state.running_count[0]

    @property
    def waiting(self) -> int:
        """Sequences not (or no longer) in the batch."""
        return self._state.waiting_count[0]

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks in use, 0..1."""
        return 1.0 - self._state.free_blocks[0] / self.limits.kv_blocks

    @property
    def context_tokens(self) -> int:
        """Tokens of KV cache held by the running sequences."""
        s = self._state
        return sum(s.computed_tokens[slot] for slot in s.running[0][: self.running])

    def submit(self, request_id: int, input_tokens: int, output_tokens: int, now_s: float, priority: int = 0) -> None:
        """Queue a request for exactly ``output_tokens`` tokens; higher ``priority`` is more important.

        Raises ``RequestTooLongError`` if its tokens can never fit the KV cache, ``ValueError`` if the id is in use
        or a length is below 1.
        """
        if input_tokens < 1 or output_tokens < 1:
            raise ValueError(f"request {request_id}: lengths must be at least 1, not {input_tokens} + {output_tokens}")
        if request_id in self._slots:
            raise ValueError(f"request {request_id} is already in the engine")
        capacity_tokens = self.limits.kv_blocks * self.limits.block_tokens
        if input_tokens + output_tokens > capacity_tokens:
            raise RequestTooLongError(
                f"{input_tokens} input + {output_tokens} output tokens exceed the KV cache of {capacity_tokens} tokens"
            )
        slot = self._free_slots.pop() if self._free_slots else self._new_slot()
        s = self._state
        s.input_tokens[slot] = input_tokens
        s.output_tokens[slot] = output_tokens
        s.computed_tokens[slot] = 0
        s.generated_tokens[slot] = 0
        s.priority[slot] = priority
        s.arrival_s[slot] = now_s
        self._requests[slot] = request_id
        self._slots[request_id] = slot
        enqueue(s, 0, slot, self.limits.by_priority)

    def _new_slot(self) -> int:
        s = self._state
        for column in (
            s.input_tokens,
            s.output_tokens,
            s.computed_tokens,
            s.generated_tokens,
            s.scheduled_tokens,
            s.blocks,
            s.priority,
        ):
            column.append(0)
        s.arrival_s.append(0.0)
        s.next_slot.append(NO_SLOT)
        self._requests.append(0)
        return len(self._requests) - 1

    def abort(self, request_id: int) -> bool:
        """Drop a request wherever it is, at once; False if the engine does not hold it (any more)."""
        slot = self._slots.pop(request_id, NO_SLOT)
        if slot == NO_SLOT:
            return False
        if not drop_running(self._state, 0, slot):
            unlink_waiting(self._state, 0, slot)
            release(self._state, 0, slot)
        self._free_slots.append(slot)
        return True

    def set_coefficients(self, coefficients: StepCoefficients) -> None:
        """Change the clock: holds from the next step on."""
        self._coefficients = coefficients

    def start_step(self, now_s: float) -> Step | None:
        """Schedule and begin a step; None if there is nothing to do. ``finish_step`` must come before the next."""
        if self._in_step:
            raise RuntimeError(f"at {now_s} s: a step is running; call finish_step first")
        s = self._state
        if s.running_count[0] == 0 and s.waiting_count[0] == 0:
            return None
        running_before = s.running_count[0]
        batch = schedule(s, 0, self.limits)
        load = (
            batch.prefill_tokens,
            batch.prefill_attention_tokens2,
            batch.decode_seqs,
            batch.context_tokens,
        )
        self._in_step = True
        return Step(
            duration_s=step_time_s(self._coefficients, *load),
            power_w=step_power_w(self._coefficients, *load),
            prefill_tokens=batch.prefill_tokens,
            decode_seqs=batch.decode_seqs,
            context_tokens=batch.context_tokens,
            preempted=tuple(self._requests[slot] for slot in s.preempted[0][: batch.preempted]),
            admitted=tuple(self._requests[slot] for slot in s.running[0][running_before : s.running_count[0]]),
        )

    def finish_step(self) -> StepResult:
        """The begun step is over: who got a token, and who their last."""
        if not self._in_step:
            raise RuntimeError("no step is running; call start_step first")
        self._in_step = False
        s = self._state
        emitted, finished = complete(s, 0)
        result = StepResult(
            emitted=tuple(self._requests[slot] for slot in s.emitted[0][:emitted]),
            finished=tuple(self._requests[slot] for slot in s.finished[0][:finished]),
        )
        for slot in s.finished[0][:finished]:
            del self._slots[self._requests[slot]]
            self._free_slots.append(slot)
        return result


def _empty_state(limits: EngineLimits) -> BatchState:
    def places() -> list[Ints]:
        return [[0] * limits.max_num_seqs]

    return BatchState(
        input_tokens=[],
        output_tokens=[],
        computed_tokens=[],
        generated_tokens=[],
        scheduled_tokens=[],
        blocks=[],
        priority=[],
        arrival_s=[],
        next_slot=[],
        running=places(),
        running_count=[0],
        waiting_head=[NO_SLOT],
        waiting_tail=[NO_SLOT],
        waiting_count=[0],
        free_blocks=[limits.kv_blocks],
        emitted=places(),
        finished=places(),
        preempted=places(),
    )
