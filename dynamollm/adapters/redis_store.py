"""RedisStore: the store of a deployment on many machines, in Redis 7 or Valkey, one server or a cluster's one slot.

Each compare-and-change is one script, so that two who do it at once cannot both win. A published document is one key
with its stamp, so that polling for something newer moves no bytes; pub/sub only says when to look.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from dynamollm.store import BEGINNING, NEVER, Document, Stamp

TIMEOUT_S = 1.0
RESUBSCRIBE_S = 1.0

# keys: lease, epoch; arguments: holder, time to live in ms, epoch of the term it is in or 0, highest epoch it has seen
HOLD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if holder then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2])
end
local term, seen = tonumber(ARGV[3]), tonumber(ARGV[4])
local highest = math.max(term, seen, tonumber(redis.call('GET', KEYS[2]) or '0'))
if term == 0 or term < highest then term = highest + 1 end
redis.call('SET', KEYS[2], term)
return term
"""
RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end return 0"
# keys: document; arguments: epoch, version, body, channel
PUBLISH = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
local e, v = tonumber(ARGV[1]), tonumber(ARGV[2])
if e < epoch or (e == epoch and v < version) then return 0 end
redis.call('HSET', KEYS[1], 'epoch', e, 'version', v, 'body', ARGV[3])
redis.call('PUBLISH', ARGV[4], ARGV[1])
return 1
"""
# keys: document; arguments: epoch, version seen
PUBLISHED = """
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
local e, v = tonumber(ARGV[1]), tonumber(ARGV[2])
if epoch < e or (epoch == e and version <= v) then return false end
return {epoch, version, redis.call('HGET', KEYS[1], 'body')}
"""
# keys: members of the group; arguments: prefix of their reports. Those that have lapsed are forgotten
REPORTS = """
local found = {}
for _, member in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local body = redis.call('GET', ARGV[1] .. member)
  if body then
    found[#found + 1] = member
    found[#found + 1] = body
  else
    redis.call('SREM', KEYS[1], member)
  end
end
return found
"""
_decode = msgspec.json.Decoder(Document).decode


class RedisStore:
    """See ``dynamollm.store.Store``. ``prefix`` keeps deployments apart that share a server."""

    def __init__(self, url: str, prefix: str = "dynamollm", timeout_s: float = TIMEOUT_S) -> None:
        self._redis: Redis = Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, health_check_interval=0
        )
        self._hold = self._redis.register_script(HOLD)
        self._release = self._redis.register_script(RELEASE)
        self._publish = self._redis.register_script(PUBLISH)
        self._published = self._redis.register_script(PUBLISHED)
        self._reports = self._redis.register_script(REPORTS)
        self._url = url.rpartition("@")[2]  # no password in messages
        self._prefix = f"{{{prefix}}}"  # braces: one slot of a cluster
        self._nudge = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    async def read(self, name: str) -> Document | None:
        """See ``Store``."""
        body = await self._do(lambda: self._redis.get(self._key("document", name)))
        return None if body is None else _document(name, body)

    async def write(self, name: str, document: Mapping[str, Any]) -> None:
        """See ``Store``."""
        body = msgspec.json.encode(document)
        await self._do(lambda: self._redis.set(self._key("document", name), body))

    async def publish(self, name: str, document: Mapping[str, Any], stamp: Stamp) -> bool:
        """See ``Store``."""
        arguments: list[int | str | bytes] = [*stamp, msgspec.json.encode(document), self._key("nudge")]
        return bool(await self._do(lambda: self._publish([self._key("published", name)], arguments)))

    async def published(self, name: str, after: Stamp = NEVER) -> tuple[Stamp, Document] | None:
        """See ``Store``."""
        found = await self._do(lambda: self._published([self._key("published", name)], after))
        return None if found is None else ((found[0], found[1]), _document(name, found[2]))

    async def nudged(self, timeout_s: float) -> None:
        """See ``Store``."""
        if self._listening is None or self._listening.done():
            self._listening = asyncio.create_task(self._listen())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._nudge.wait()
        self._nudge.clear()

    async def _listen(self) -> None:
        """Pass nudges on for as long as there is somebody to hear them; subscribe again after a failure."""
        while True:
            try:
                async with self._redis.pubsub() as subscription:
                    await self._pass_on(subscription)
            except (RedisError, OSError):
                await asyncio.sleep(RESUBSCRIBE_S)

    async def _pass_on(self, subscription: PubSub) -> None:
        await subscription.subscribe(self._key("nudge"))
        while True:
            if await subscription.get_message(ignore_subscribe_messages=True, timeout=None):
                self._nudge.set()

    async def report(self, group: str, member: str, document: Mapping[str, Any], ttl_s: float) -> None:
        """See ``Store``."""
        body = msgspec.json.encode(document)

        async def both() -> None:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.sadd(self._key("members", group), member)
                pipeline.set(self._key("report", group, member), body, px=round(ttl_s * 1000))
                await pipeline.execute()

        await self._do(both)

    async def reports(self, group: str) -> dict[str, Document]:
        """See ``Store``."""
        found = await self._do(lambda: self._reports([self._key("members", group)], [self._key("report", group, "")]))
        return {
            member.decode(): _document(group, body)
            for member, body in sorted(zip(found[::2], found[1::2], strict=True))
        }

    async def append(self, stream: str, entries: Sequence[Mapping[str, Any]], most: int) -> None:
        """See ``Store``."""
        bodies = [msgspec.json.encode(entry) for entry in entries]

        async def add() -> None:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for body in bodies:
                    pipeline.xadd(self._key("stream", stream), {b"body": body}, maxlen=most, approximate=True)
                await pipeline.execute()

        await self._do(add)

    async def entries(self, stream: str, after: str = BEGINNING, most: int = 1000) -> list[tuple[str, Document]]:
        """See ``Store``."""
        begin = f"({after}" if after else "-"
        found = await self._do(lambda: self._redis.xrange(self._key("stream", stream), min=begin, count=most))
        return [(entry_id.decode(), _document(stream, fields[b"body"])) for entry_id, fields in found]

    async def hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        """See ``Leadership``."""
        keys = [self._key("lease"), self._key("epoch")]
        arguments: list[int | str] = [holder, round(ttl_s * 1000), epoch, seen_epoch]
        return int(await self._do(lambda: self._hold(keys, arguments))) or None

    async def release(self, holder: str) -> None:
        """See ``Leadership``."""
        await self._do(lambda: self._release([self._key("lease")], [holder]))

    async def close(self) -> None:
        """See ``Store``."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self._redis.aclose()

    def _key(self, *parts: str) -> str:
        return ":".join((self._prefix, *parts))

    async def _do(self, ask: Callable[[], Awaitable[Any]]) -> Any:
        try:
            return await ask()
        except (RedisError, OSError) as error:
            raise OSError(f"store {self._url}: {error}") from None


def _document(name: str, body: bytes) -> Document:
    try:
        return _decode(body)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{name}: {error}") from None
