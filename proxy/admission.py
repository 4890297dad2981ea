"""Admission: from a request's bytes to a ``Request`` the router understands, or the error that says why not.

body -> fields -> model -> input tokens -> predicted output -> class -> SLO and priority. The body is forwarded as it
came unless a field must change: vLLM's ``priority`` (an error there unless the engine orders by it), and the usage
event of streams, which accounting needs and the client then does not see unless it asked.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from pools.classes import REQUEST_CLASSES, Slo
from pools.prefixes import Prefix, prefix_of
from pools.request import Request
from pools.tokens import Messages, TokenCount
from proxy import errors
from proxy.fields import PROMPT_KEYS, READERS, RequestFields, prompt_of, rewritten, stream_options_with_usage
from proxy.heads import ClientHead, Headers
from proxy.services import GatewayServices
from proxy.terms import Terms

_CLASS_LINES = [b"x-dynamollm-class: %b\r\n" % each.name.encode() for each in REQUEST_CLASSES]
_COUNTED_AT_ONCE_BYTES = 1024  # bodies up to here are tokenised in well under a millisecond


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """A request ready to be routed and sent."""

    request: Request
    fields: RequestFields
    path: bytes
    lines: bytes  # headers to send on
    body: bytes
    usage_injected: bool  # the client did not ask for the usage event
    tier: str | None  # service tier to tell the client
    own_lines: bytes  # response headers known already

    def message(self, authority: bytes) -> bytes:
        """The whole HTTP request to an instance at ``authority``."""
        return b"POST %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n%b" % (
            self.path,
            authority,
            self.lines,
            len(self.body),
            self.body,
        )


@dataclass(frozen=True, slots=True)
class Undecided:
    """The prompt must be counted exactly, and is too long to do so here: call ``count`` elsewhere, then admit again."""

    count: Callable[[], TokenCount]


class _TooLongToCount(Exception):
    """Raised where the text is wanted, to be caught where the count was."""


def _short_prompt_of(path: bytes, body: bytes) -> str | Messages:
    """A body's prompt text, but not where counting it would hold up the others."""
    if len(body) > _COUNTED_AT_ONCE_BYTES:
        raise _TooLongToCount
    return prompt_of(path, body)


def is_known(keys: tuple[bytes, ...], authorization: bytes | None) -> bool:
    """Whether an Authorization header bears one of the keys; without keys, everybody is known."""
    if not keys:
        return True
    scheme, _, key = (authorization or b"").partition(b" ")
    known = [hmac.compare_digest(key.strip(), one) for one in keys]  # all of them: no early exit to time
    return scheme.lower() == b"bearer" and any(known)


class Admission:
    """Admits requests; counts its ids."""

    def __init__(self, services: GatewayServices) -> None:
        self._services = services
        self._settings = services.settings
        self._keys = tuple(key.encode() for key in services.settings.api_keys)
        engine_key = services.settings.engine_api_key
        self._engine_key = b"authorization: Bearer %b\r\n" % engine_key.encode() if engine_key else b""
        self._slos = [services.settings.slos.slo(each) for each in REQUEST_CLASSES]
        self._ids = 0

    def next_id(self) -> str:
        """An id no other request of this process has."""
        self._ids += 1
        return f"{self._settings.request_id_prefix}{self._ids}"

    def authorize(self, authorization: bytes | None) -> None:
        """Raises ``ApiError`` 401 where keys are configured and this is none of them."""
        if not self._known(authorization):
            raise errors.unauthorized()

    def _known(self, authorization: bytes | None) -> bool:
        return is_known(self._keys, authorization)

    def read_head(self, headers: Headers) -> ClientHead:
        """The headers of a relayed request, read, and whether its key is one of ours."""
        head = ClientHead(headers, self._settings.slo_bounds_s)
        authorization = head.terms.authorization
        head.authorized = self._known(authorization)
        if self._engine_key:
            head.passed_lines += self._engine_key
        elif authorization is not None and not self._keys:
            head.passed_lines += b"authorization: %b\r\n" % authorization
        return head

    def admit(
        self,
        path: bytes,
        head: ClientHead,
        body: bytes,
        request_id: str,
        now_s: float,
        input_tokens: int | None = None,
    ) -> Admitted | Undecided:
        """What is to be routed; ``request_id`` is ours, the client may have its own. Raises ``ApiError``.

        ``input_tokens`` is given where it was ``Undecided`` before.
        """
        if not head.authorized:
            raise errors.unauthorized()
        terms = head.terms
        for control in terms.invalid:
            self._services.metrics.invalid.add((control,))
        fields = READERS[path](body)
        model = self._model(fields.model)
        if input_tokens is None:
            input_tokens = fields.input_tokens
        if input_tokens is None:
            count = self._services.tokens.count
            try:
                input_tokens = count(model, fields.size, partial(_short_prompt_of, path, body)).tokens
            except _TooLongToCount:
                return Undecided(partial(count, model, fields.size, partial(prompt_of, path, body)))
        prefix = prefix_of(model, body, PROMPT_KEYS[path]) if self._settings.prefix_affinity else None
        request = self._request(fields, terms, request_id, now_s, model, input_tokens, prefix)
        sent_body, usage_injected = self._forwarded(body, fields, request.priority)
        id_line = b"x-request-id: %b\r\n" % (terms.request_id or request_id.encode())
        return Admitted(
            request,
            fields,
            path,
            head.passed_lines + id_line,
            sent_body,
            usage_injected,
            None if fields.service_tier is None else self._tier(fields.service_tier),
            b"%b%bx-dynamollm-input-tokens: %d\r\n" % (id_line, _CLASS_LINES[request.request_class], input_tokens),
        )

    def _request(
        self,
        fields: RequestFields,
        terms: Terms,
        request_id: str,
        now_s: float,
        model: str,
        input_tokens: int,
        prefix: Prefix | None,
    ) -> Request:
        services, slos = self._services, self._settings.slos
        output_tokens = services.lengths.output_tokens(fields, model, input_tokens, terms.tenant)
        request_class = slos.cuts.classify(input_tokens, output_tokens)
        if input_tokens <= slos.cuts.longest_input_tokens:
            slo = self._slos[request_class]
        else:
            slo = slos.slo(request_class, input_tokens)
        if terms.ttft_s is not None or terms.tbt_s is not None:
            slo = Slo(terms.ttft_s or slo.ttft_s, terms.tbt_s or slo.tbt_s)
        return Request(
            request_id,
            model,
            now_s,
            input_tokens,
            output_tokens,
            request_class,
            slo,
            self._priority(fields, terms),
            terms.tenant,
            fields.stream,
            prefix,
        )

    def _model(self, name: str | None) -> str:
        models = self._services.directory.models()
        if name in models:
            return str(name)
        if not name and len(models) == 1:  # an empty name is none, as it is to vLLM
            return next(iter(models))
        if not name:
            raise errors.bad_request("The request names no model and several are served", "body.model")
        raise errors.model_not_found(name)

    def _priority(self, fields: RequestFields, terms: Terms) -> int:
        """Higher is more important: the objective's, else the tier's, else vLLM's field with its sign turned."""
        settings = self._settings
        if terms.objective is not None:
            priority = settings.objectives.get(terms.objective)
            if priority is not None:
                return priority
            self._services.metrics.invalid.add(("objective",))
        if fields.service_tier is not None and fields.service_tier != "auto":
            priority = settings.tier_priorities.get(fields.service_tier)
            if priority is not None:
                return priority
            self._services.metrics.invalid.add(("service_tier",))
        return -(fields.engine_priority or 0)

    def _tier(self, asked: str) -> str:
        """The tier used: ``auto`` and unknown ones are served as ``default``."""
        return asked if asked in self._settings.tier_priorities else "default"

    def _forwarded(self, body: bytes, fields: RequestFields, priority: int) -> tuple[bytes, bool]:
        changes: dict[str, Any] = {}
        if self._settings.engine_orders_by_priority:
            if priority or fields.engine_priority is not None:
                changes["priority"] = -priority
        elif fields.engine_priority is not None:
            changes["priority"] = None
        inject_usage = fields.stream and not fields.include_usage
        if inject_usage:
            changes["stream_options"] = stream_options_with_usage(body)
        return (rewritten(body, changes) if changes else body), inject_usage
