"""Reply: one HTTP request being answered by an engine: its sequences, what was sent of each, and how it ends."""

from collections.abc import Callable

from simulator.emulator.adapters.http import Exchange
from simulator.emulator.bodies import Choice, Generation
from simulator.emulator.errors import ApiError
from simulator.emulator.metrics import SequenceTimes
from simulator.emulator.render import DONE, StreamRenderer, whole_answer


class Sequence:
    """One choice of a request, in the engine under ``id``."""

    __slots__ = ("choice", "closed", "generated", "id", "index", "reason", "reply", "sent", "times")

    def __init__(self, sequence_id: int, reply: "Reply", index: int, choice: Choice, arrival_s: float) -> None:
        self.id = sequence_id
        self.reply = reply
        self.index = index
        self.choice = choice
        self.times = SequenceTimes(choice.input_tokens, arrival_s)
        self.generated = 0  # tokens from the engine
        self.sent = 0  # tokens given to the client
        self.reason = ""  # why it ended; empty while it goes on
        self.closed = False  # its finish reason has been sent


class Reply:
    """The answer to one request, streamed or whole. ``on_over`` is called once, however it ends."""

    def __init__(
        self,
        exchange: Exchange,
        generation: Generation,
        request_id: str,
        model: str,
        created: int,
        on_over: Callable[["Reply"], None],
    ) -> None:
        self.exchange = exchange
        self.generation = generation
        self.sequences: list[Sequence] = []
        self.tokens_per_chunk = 1
        self.fails_after_tokens: int | None = None  # injected fault
        self._request_id = request_id
        self._model = model
        self._created = created
        self._on_over = on_over
        self._begun = False  # role chunks (or echoed prompts) have been sent
        self._renderer = StreamRenderer(generation, request_id, model, created) if generation.stream else None
        exchange.on_gone = self._gone

    def begin(self) -> None:
        """200 and the headers of a stream; nothing for an answer that comes whole."""
        if self._renderer is not None:
            self.exchange.begin_stream()
            self.exchange.on_writable = self.flush

    def flush(self) -> None:
        """Send what the engine has produced since the last time, or wait if the client cannot take it."""
        renderer = self._renderer
        if renderer is None:
            if all(sequence.reason for sequence in self.sequences):
                ends = [(sequence.generated, sequence.reason) for sequence in self.sequences]
                answer = whole_answer(self.generation, self._request_id, self._model, self._created, ends)
                self.exchange.respond(200, answer)
                self._on_over(self)
            return
        if not self.exchange.writable:
            return
        chunks = b"".join([self._chunk(renderer, sequence) for sequence in self.sequences])
        if not self._begun and chunks:
            self._begun = True
            chunks = b"".join([renderer.first(sequence.index) for sequence in self.sequences]) + chunks
        if all(sequence.closed for sequence in self.sequences):
            self.exchange.end(chunks + renderer.end(sum(sequence.generated for sequence in self.sequences)))
            self._on_over(self)
        elif chunks:
            self.exchange.send(chunks)

    def _chunk(self, renderer: StreamRenderer, sequence: Sequence) -> bytes:
        begin, end = sequence.sent, sequence.generated
        if sequence.closed or (not sequence.reason and end - begin < (1 if begin == 0 else self.tokens_per_chunk)):
            return b""
        sequence.sent = end
        if sequence.reason:
            sequence.closed = True
            return renderer.last(sequence.index, begin, end, sequence.reason)
        return renderer.tokens(sequence.index, begin, end)

    def fail(self, error: ApiError) -> None:
        """End with an error: an event if the stream has begun, a status otherwise."""
        if self.exchange.answered:
            self.exchange.end(error.event() + DONE)
        else:
            self.exchange.respond(error.status, error.body())
        self._on_over(self)

    def _gone(self) -> None:
        self._on_over(self)
