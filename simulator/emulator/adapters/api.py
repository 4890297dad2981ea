"""The routes of an emulated vLLM server: what it answers to which path, in vLLM 0.32's words.

``/sleep``, ``/wake_up``, ``/pause`` and their like are what vLLM serves with VLLM_SERVER_DEV_MODE=1.
"""

import hmac
import time
import uuid
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qs

import msgspec

from pools.instances import InstanceState
from simulator.emulator import bodies
from simulator.emulator.adapters.http import TEXT, Exchange
from simulator.emulator.adapters.instance import EmulatedInstance, PauseMode
from simulator.emulator.adapters.tasks import Spawned
from simulator.emulator.errors import ApiError, bad_request, engine_dead, shutting_down
from simulator.emulator.render import models_answer
from simulator.emulator.validation import decode_json

VERSION = "0.32.0"
PAUSE_MODES = ("abort", "wait", "keep")
Route = Callable[[EmulatedInstance, Exchange], None]


def _json(exchange: Exchange, value: object, status: int = HTTPStatus.OK) -> None:
    exchange.respond(status, msgspec.json.encode(value))


class VllmApi:
    """Answers for any number of instances."""

    def __init__(self) -> None:
        self._spawned = Spawned()
        get: dict[str, Route] = {
            "/v1/models": self._models,
            "/health": self._health,
            "/ping": self._health,
            "/version": lambda instance, exchange: _json(exchange, {"version": VERSION}),
            "/load": self._load,
            "/metrics": self._metrics,
            "/is_sleeping": lambda i, exchange: _json(exchange, {"is_sleeping": i.sleep_level > 0}),
            "/is_paused": lambda i, exchange: _json(exchange, {"is_paused": i.paused}),
        }
        post: dict[str, Route] = {
            "/v1/chat/completions": partial(self._generate, bodies.parse_chat),
            "/v1/completions": partial(self._generate, bodies.parse_completion),
            "/tokenize": partial(self._tokens, bodies.parse_tokenize),
            "/detokenize": partial(self._tokens, bodies.parse_detokenize),
            "/ping": self._health,
            "/sleep": self._sleep,
            "/wake_up": self._wake_up,
            "/pause": self._pause,
            "/resume": self._resume,
        }
        self._routes = {"GET": get, "POST": post}
        self._paths = get.keys() | post.keys()

    def close(self) -> None:
        """Drop what is still being answered on the side."""
        self._spawned.cancel()

    def handle(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        """Answer one request."""
        path = exchange.path
        route = self._routes.get(exchange.method, {}).get(path)
        if route is None:
            known = path in self._paths
            status = HTTPStatus.METHOD_NOT_ALLOWED if known else HTTPStatus.NOT_FOUND
            _json(exchange, {"detail": status.phrase}, status)
        elif path.startswith("/v1/") and not _authorized(exchange, instance.options.api_key):
            _json(exchange, {"error": "Unauthorized"}, HTTPStatus.UNAUTHORIZED)
        else:
            try:
                route(instance, exchange)
            except ApiError as error:
                exchange.respond(error.status, error.body())

    def _models(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        exchange.respond(200, models_answer(instance.options.model, instance.rules.max_model_len, instance.created))

    def _health(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        """200 whatever the engine does, even once more after its death; draining, asleep and hung do not show."""
        if instance.engine_died:
            instance.health_checks_left -= 1
            exchange.respond(200 if instance.health_checks_left >= 0 else 503)
        else:
            exchange.respond(200)

    def _load(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        tracked = instance.options.enable_server_load_tracking
        _json(exchange, {"server_load": instance.requests_in_flight if tracked else 0})

    def _metrics(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        exchange.respond(200, instance.metrics.render(instance.gauges()), TEXT)

    def _generate(
        self,
        parse: Callable[[Any, bodies.BodyRules], bodies.Generation],
        instance: EmulatedInstance,
        exchange: Exchange,
    ) -> None:
        content_type = exchange.headers.get(b"content-type", b"").decode("latin-1")
        generation = parse(decode_json(exchange.body, content_type), instance.rules)
        if instance.engine_died:
            raise engine_dead()
        if instance.state is InstanceState.DRAINING:
            raise shutting_down()
        asked_id = exchange.headers.get(b"x-request-id", b"").decode("latin-1")
        kind = "chatcmpl" if generation.chat else "cmpl"
        instance.accept(exchange, generation, f"{kind}-{asked_id or uuid.uuid4().hex[:16]}", int(time.time()))

    def _tokens(
        self,
        parse: Callable[[Any, bodies.BodyRules], dict[str, Any]],
        instance: EmulatedInstance,
        exchange: Exchange,
    ) -> None:
        content_type = exchange.headers.get(b"content-type", b"").decode("latin-1")
        _json(exchange, parse(decode_json(exchange.body, content_type), instance.rules))

    # --- sleep and pause ---------------------------------------------------------------------------------------------

    def _sleep(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        query = parse_qs(exchange.query)
        level = query.get("level", ["1"])[0]
        if level not in ("1", "2"):
            raise bad_request("level must be 1 or 2.", "level", level)
        answer = {"status": "sleeping", "level": int(level)}
        self._later(instance.sleep(int(level), _mode(query)), exchange, answer)

    def _wake_up(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        tags = parse_qs(exchange.query).get("tags")
        if tags is not None and "scheduling" not in tags and set(tags) != {"weights", "kv_cache"}:
            _json(exchange, {"status": "sleeping", "tags": tags})  # a part of the memory is not awake
        else:
            self._later(instance.wake(), exchange, {"status": "awake", "tags": tags})

    def _pause(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        self._later(instance.pause(_mode(parse_qs(exchange.query))), exchange, {"status": "paused"})

    def _resume(self, instance: EmulatedInstance, exchange: Exchange) -> None:
        instance.resume()
        _json(exchange, {"status": "resumed"})

    def _later(self, work: Coroutine[Any, Any, None], exchange: Exchange, answer: object) -> None:
        async def finish() -> None:
            await work
            _json(exchange, answer)

        self._spawned.spawn(finish())


def _authorized(exchange: Exchange, api_key: str | None) -> bool:
    if api_key is None:
        return True
    given = exchange.headers.get(b"authorization", b"")
    return hmac.compare_digest(given, b"Bearer " + api_key.encode())


def _mode(query: dict[str, list[str]]) -> PauseMode:
    mode = query.get("mode", ["abort"])[0]
    if mode not in PAUSE_MODES:
        raise bad_request(f"mode must be one of {', '.join(PAUSE_MODES)}.", "mode", mode)
    return cast(PauseMode, mode)
