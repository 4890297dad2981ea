"""EmulatedInstance: one vLLM server with its engine and GPUs, from loading weights to the closing of its port.

States are those of ``pools.instances``: STARTING (port taken, connections refused), READY, PARKED (asleep), DRAINING
(after SIGTERM: running requests finish, new ones get 500, /health stays 200), then STOPPED or FAILED. Routes stand in
``api``, the engine's timing in ``pump``.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from energy.profile import EnergyProfile, GpuState
from pools.instances import InstanceState
from simulator.emulator.adapters.http import Exchange, HttpServer
from simulator.emulator.adapters.pump import EnginePump
from simulator.emulator.adapters.replies import Reply
from simulator.emulator.adapters.replies import Sequence as EngineSequence
from simulator.emulator.bodies import BodyRules, Generation
from simulator.emulator.errors import ApiError, engine_dead, queue_full
from simulator.emulator.gpus import EmulatedGpu, EmulatedNode, PowerMeter
from simulator.emulator.metrics import EngineGauges, EngineMetrics
from simulator.emulator.text import OutputLengths, Tokenizer
from simulator.engine import Engine, EngineLimits, RequestTooLongError, Step

DEFAULT_LIMITS = EngineLimits(kv_blocks=0)  # as in virtual time: one engine model, one set of defaults
BLOCK_TOKENS = DEFAULT_LIMITS.block_tokens
PORT_CLOSES_AFTER_S = 0.5  # a dead engine's server answers this long before its port closes
LOOPBACK = "127.0.0.1"
PauseMode = Literal["abort", "wait", "keep"]


class InstanceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one emulated vLLM server is started; what vLLM has a flag for bears its name."""

    id: str
    model: str  # the served name
    tp: int
    node: str
    gpus: tuple[int, ...]
    pool: str = ""  # whose it is; told to whoever takes it over
    sm_clock_mhz: int | None = None  # None: leave the clocks as they are
    host: str = ""  # "": that of the process' control endpoint
    port: int = 0
    startup_s: float = 0.0  # loading weights; the port refuses connections meanwhile
    wake_s: float = 1.0  # weights back from host memory
    max_model_len: int = 131_072  # cut to what the KV cache holds, as vLLM's ``auto``
    max_num_seqs: int = DEFAULT_LIMITS.max_num_seqs
    max_num_batched_tokens: int = DEFAULT_LIMITS.max_num_batched_tokens
    max_num_queued_reqs: int | None = None
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    enable_server_load_tracking: bool = True
    api_key: str | None = None
    seed: int = 0
    lengths: OutputLengths = OutputLengths()


class Faults(msgspec.Struct, forbid_unknown_fields=True):
    """Injected faults that last until they are changed; for tests."""

    slow_factor: float = 1.0  # every step takes this many times longer
    hang: bool = False  # the engine stops stepping, /health stays 200
    error_events: int = 0  # so many next requests get an error: as an event if they stream
    error_after_tokens: int = 0  # ... after this many output tokens
    tokens_per_chunk: int = 1  # a chunk carries this many tokens, as a busy server's do


class EmulatedInstance:
    """See the module. ``on_state(instance, reason)`` hears of every change of state."""

    def __init__(
        self,
        options: InstanceOptions,
        profile: EnergyProfile,
        tokenizer: Tokenizer,
        node: EmulatedNode,
        created: int,
        on_state: Callable[["EmulatedInstance", str], None],
        handler: Callable[["EmulatedInstance", Exchange], None],
    ) -> None:
        self.options = options
        self.created = created
        self.state = InstanceState.STARTING
        self.sleep_level = 0
        self.paused = False
        self.engine_died = False
        self.faults = Faults()
        self.health_checks_left = 1  # answered with 200 after the engine has died
        self._profile = profile
        self._node = node
        self._on_state = on_state
        self._loop = asyncio.get_running_loop()
        kv_blocks = profile.kv_capacity_tokens(options.tp) // BLOCK_TOKENS
        capacity_tokens = kv_blocks * BLOCK_TOKENS
        by_priority = options.scheduling_policy == "priority"
        max_model_len = min(options.max_model_len, capacity_tokens)
        self.rules = BodyRules(options.model, max_model_len, tokenizer, options.lengths, by_priority, options.seed)
        self.metrics = EngineMetrics(options.model, kv_blocks, BLOCK_TOKENS)
        self._server = HttpServer(lambda exchange: handler(self, exchange))
        self._host = options.host or LOOPBACK
        self.port = self._server.bind(self._host, options.port)
        self._meter = PowerMeter(self._loop.time(), 0.0)
        try:
            self.gpus: list[EmulatedGpu] = node.take(options.gpus, self, self._meter, self._loop.time())
        except Exception:
            self._server.close()
            raise
        limits = EngineLimits(
            kv_blocks=kv_blocks,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            block_tokens=BLOCK_TOKENS,
            by_priority=by_priority,
        )
        engine = Engine(limits, profile.step(options.tp, self.sm_clock_mhz))
        self.pump = EnginePump(engine, self._meter, self._on_step, self._on_tokens, self._flush)
        self._sequences: dict[int, EngineSequence] = {}
        self._replies: set[Reply] = set()
        self._touched: dict[Reply, None] = {}
        self._ids = itertools.count(1)
        self._emptied: list[asyncio.Future[None]] = []
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.TimerHandle | None = None
        self.set_sm_clock(options.sm_clock_mhz)
        self.on_clock_change()

    # --- what others see ---------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Its name."""
        return self.options.id

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    @property
    def sm_clock_mhz(self) -> int:
        """Clock of the slowest of its GPUs; they work in lock-step."""
        return min(gpu.sm_clock_mhz for gpu in self.gpus)

    @property
    def requests_in_flight(self) -> int:
        """Requests accepted and not answered to the end."""
        return len(self._replies)

    def gauges(self) -> EngineGauges:
        """What the engine is doing now."""
        engine = self.pump.engine
        return EngineGauges(engine.running, engine.waiting, engine.kv_usage, self.sleep_level)

    # --- life --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load; READY follows after ``startup_s``."""
        self._starting = self._loop.create_task(self._load())

    async def _load(self) -> None:
        self._on_state(self, "")
        await asyncio.sleep(self.options.startup_s)
        await self._server.listen()
        self._enter(InstanceState.READY)

    async def stop(self, grace_s: float) -> None:
        """As SIGTERM with ``--shutdown-timeout grace_s``; returns when the port is closed and the GPUs are free."""
        if self.state in (InstanceState.STOPPED, InstanceState.FAILED):
            return
        if self._starting is not None:
            self._starting.cancel()
        self._enter(InstanceState.DRAINING)
        if self._replies and grace_s > 0:
            emptied = self._loop.create_future()
            self._emptied.append(emptied)
            await asyncio.wait([emptied], timeout=grace_s)
        self._fail_all(engine_dead())
        self._close("")

    def crash(self) -> None:
        """The engine dies: open streams get an error event, the server answers once more, then its port closes."""
        self.pump.stop()
        self.engine_died = True
        self._fail_all(engine_dead())
        self._closing = self._loop.call_later(PORT_CLOSES_AFTER_S, self._close, "engine died")

    def kill(self) -> None:
        """The whole process dies: connections are reset."""
        self._close("process died", reset=True)

    def _close(self, reason: str, reset: bool = False) -> None:
        if self.state in (InstanceState.STOPPED, InstanceState.FAILED):
            return
        if self._closing is not None:
            self._closing.cancel()
        if self._starting is not None:
            self._starting.cancel()
        self.pump.stop()
        self._server.close(reset)
        now_s = self._loop.time()
        for gpu in self.gpus:
            gpu.detach(now_s)
        self._enter(InstanceState.FAILED if reason else InstanceState.STOPPED, reason)

    def _enter(self, state: InstanceState, reason: str = "") -> None:
        self.state = state
        self._on_state(self, reason)

    # --- clock, sleep, pause -----------------------------------------------------------------------------------------

    def set_sm_clock(self, sm_clock_mhz: int | None) -> int:
        """Lock the clock of all its GPUs (None: leave them); returns the clock in force."""
        if sm_clock_mhz is not None:
            for gpu in self.gpus:
                gpu.lock(sm_clock_mhz)
        return self.sm_clock_mhz

    def on_clock_change(self) -> None:
        """One of its GPUs runs at another clock: holds from the next step on."""
        clock_mhz = self.sm_clock_mhz
        self.pump.engine.set_coefficients(self._profile.step(self.options.tp, clock_mhz))
        state = GpuState.PARKED if self.sleep_level else GpuState.LOADED
        self._meter.set_idle(self._loop.time(), self._profile.idle_power_w(state, clock_mhz))

    async def pause(self, mode: PauseMode) -> None:
        """Stop generating: abort what runs, wait for it, or keep it where it is. New requests wait."""
        if mode == "wait" and self._replies:
            emptied = self._loop.create_future()
            self._emptied.append(emptied)
            await emptied
        self.paused = True
        self._apply_hold()
        if mode == "abort":
            self._abort_all()

    def resume(self) -> None:
        """Undo ``pause``."""
        self.paused = False
        self._apply_hold()

    async def sleep(self, level: int, mode: PauseMode) -> None:
        """Free the GPUs' memory (level 1: weights to host memory, 2: discarded). Requests hang, /health stays 200."""
        await self.pause(mode)
        self.sleep_level = level
        self.on_clock_change()
        if self.state is InstanceState.READY:
            self._enter(InstanceState.PARKED)

    async def wake(self) -> None:
        """Undo ``sleep``, once the weights are back."""
        if self.sleep_level:
            await asyncio.sleep(self.options.wake_s)
            self.sleep_level = 0
            self.on_clock_change()
            if self.state is InstanceState.PARKED:
                self._enter(InstanceState.READY)
        self.resume()

    def set_faults(self, faults: Faults) -> None:
        """Inject faults from now on."""
        self.faults = faults
        self.pump.slow_factor = faults.slow_factor
        self._apply_hold()

    def _apply_hold(self) -> None:
        self.pump.hold(self.paused or self.faults.hang)

    # --- requests ----------------------------------------------------------------------------------------------------

    def accept(self, exchange: Exchange, generation: Generation, request_id: str, created: int) -> None:
        """Take a valid request: a stream's 200 goes out now, the engine gets it a moment later.

        The queue limit is looked at twice, as vLLM does: a request may pass now and find the queue full when it gets
        there, which a stream can only say in an event. Raises ``ApiError`` if it does not pass now.
        """
        limit = self.options.max_num_queued_reqs
        if limit is not None and len(self._sequences) >= limit:
            self.metrics.rejected_requests += 1
            raise queue_full()
        reply = Reply(exchange, generation, request_id, self.options.model, created, self._over)
        reply.tokens_per_chunk = self.faults.tokens_per_chunk
        reply.begin()
        self._replies.add(reply)
        self._loop.call_soon(self._submit, reply, self._loop.time())

    def _submit(self, reply: Reply, arrival_s: float) -> None:
        if reply not in self._replies:
            return  # gone already
        error = self._refusal(reply)
        if error is not None:
            reply.fail(error)
            return
        generation = reply.generation
        if self.faults.error_events > 0:
            self.faults.error_events -= 1
            reply.fails_after_tokens = self.faults.error_after_tokens
            if reply.fails_after_tokens == 0:
                reply.fail(engine_dead())
                return
        self.metrics.request_choices.observe(len(generation.choices))
        self.metrics.request_max_tokens.observe(generation.max_tokens)
        for index, choice in enumerate(generation.choices):
            sequence = EngineSequence(next(self._ids), reply, index, choice, arrival_s)
            reply.sequences.append(sequence)
            self._sequences[sequence.id] = sequence
            try:
                self.pump.engine.submit(
                    sequence.id, choice.input_tokens, choice.output_tokens, arrival_s, generation.priority
                )
            except RequestTooLongError as too_long:
                reply.fail(ApiError(400, "BadRequestError", str(too_long)))
                return
        self.pump.kick()

    def _refusal(self, reply: Reply) -> ApiError | None:
        if self.engine_died:
            return engine_dead()
        limit = self.options.max_num_queued_reqs
        if limit is not None and len(self._sequences) >= limit:
            self.metrics.rejected_requests += 1
            return queue_full()
        return reply.generation.vocabulary_error

    def _over(self, reply: Reply) -> None:
        """A reply has ended: answered, failed, or its client left; whatever is still in the engine goes."""
        self._replies.discard(reply)
        self._touched.pop(reply, None)
        for sequence in reply.sequences:
            if self._sequences.pop(sequence.id, None) is not None:
                self.pump.engine.abort(sequence.id)
        if not self._replies:
            waiting, self._emptied = self._emptied, []
            for emptied in waiting:
                if not emptied.done():
                    emptied.set_result(None)

    def _fail_all(self, error: ApiError) -> None:
        now_s = self._loop.time()
        for reply in tuple(self._replies):
            for sequence in reply.sequences:
                if not sequence.reason:
                    self.metrics.on_end(sequence.times, sequence.generated, "error", now_s)
            reply.fail(error)

    def _abort_all(self) -> None:
        now_s = self._loop.time()
        for reply in tuple(self._replies):
            for sequence in reply.sequences:
                if not sequence.reason:
                    sequence.reason = "abort"
                    self.pump.engine.abort(sequence.id)
                    del self._sequences[sequence.id]
                    self.metrics.on_end(sequence.times, sequence.generated, "abort", now_s)
            if reply.sequences:
                reply.flush()

    # --- what the pump calls -----------------------------------------------------------------------------------------

    def _on_step(self, step: Step, at_s: float) -> None:
        self.metrics.on_step(step.prefill_tokens, step.decode_seqs, len(step.preempted))
        for sequence_id in step.preempted:
            self._sequences[sequence_id].times.preemptions += 1
        for sequence_id in step.admitted:
            times = self._sequences[sequence_id].times
            if times.scheduled_s < 0:
                times.scheduled_s = max(at_s, times.arrival_s)

    def _on_tokens(self, emitted: Sequence[int], finished: Sequence[int], at_s: float) -> None:
        sequences, metrics, touched = self._sequences, self.metrics, self._touched
        for sequence_id in emitted:
            sequence = sequences[sequence_id]
            sequence.generated += 1
            metrics.on_token(sequence.times, at_s)
            touched[sequence.reply] = None
        for sequence_id in finished:
            sequence = sequences.pop(sequence_id)
            sequence.reason = sequence.choice.finish_reason
            metrics.on_end(sequence.times, sequence.generated, sequence.reason, at_s)

    def _flush(self) -> None:
        touched, self._touched = self._touched, {}
        for reply in touched:
            if reply.fails_after_tokens is not None and reply.sequences[0].generated >= reply.fails_after_tokens:
                reply.fail(engine_dead())
            else:
                reply.flush()
