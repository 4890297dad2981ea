"""KubernetesApi: the API server as the Kubernetes driver needs it, plain objects in and out.

The official client does configuration, authentication and TLS; requests are made by path, so that every server from
1.20 on understands them: core/v1 pods and nodes, apps/v1 deployments and their scale, coordination/v1 leases. Told to
slow down (429) or to come back (500, 503, 504), it does so a few times. What it cannot repair it says::

    DriverError
    +-- ApiError            the server refused; ``status`` says how
        +-- NotFoundError   404
        +-- ConflictError   409: changed by somebody else since it was read, or there already
        +-- GoneError       410: a watch asked for what is forgotten; list again
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config import ConfigException

from pools.drivers.port import DriverError

Object = dict[str, Any]
Query = list[tuple[str, str]]

CALL_TIMEOUT_S = 15.0
RETRIES = 5
FIRST_RETRY_S = 0.1
LONGEST_RETRY_S = 10.0
WATCH_S = 60  # a watch that tells nothing for longer is begun anew
TRY_AGAIN = frozenset({429, 500, 503, 504})
MERGE = "application/merge-patch+json"
STRATEGIC_MERGE = "application/strategic-merge-patch+json"


class ApiError(DriverError):
    """The API server refused; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotFoundError(ApiError):
    """There is no such object."""


class ConflictError(ApiError):
    """The object is not as the caller thought."""


class GoneError(ApiError):
    """The version asked for is forgotten."""


_ERRORS: Mapping[int, type[ApiError]] = {404: NotFoundError, 409: ConflictError, 410: GoneError}


class KubernetesApi:
    """One API server and namespace. Use it within one event loop, and ``close`` it."""

    def __init__(self, namespace: str, context: str | None = None, url: str | None = None) -> None:
        """In a pod, its service account; else the kubeconfig's ``context``. ``url``: that one, without credentials."""
        self.namespace = namespace
        self._context = context
        self._url = url
        self._client: Any = None

    async def _connect(self) -> Any:
        if self._client is None:
            configuration = client.Configuration(host=self._url) if self._url else client.Configuration()
            if self._url is None:
                try:
                    config.load_incluster_config(configuration)
                except ConfigException:
                    try:
                        await config.load_kube_config(context=self._context, client_configuration=configuration)
                    except (ConfigException, OSError) as error:
                        raise DriverError(f"no Kubernetes: neither in a pod nor by a kubeconfig: {error}") from None
            self._client = client.ApiClient(configuration)
        return self._client

    async def close(self) -> None:
        """Close its connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    # --- objects -----------------------------------------------------------------------------------------------------

    def path(self, kind: str, name: str = "", part: str = "") -> str:
        """The path of a kind (``pods``, ``nodes``, ``deployments``, ``leases``), one of it, or a part of that."""
        group = {"deployments": "apis/apps/v1", "leases": "apis/coordination.k8s.io/v1"}.get(kind, "api/v1")
        place = "" if kind == "nodes" else f"/namespaces/{self.namespace}"
        return "/" + "/".join(word for word in (f"{group}{place}", kind, name, part) if word)

    async def get(self, kind: str, name: str) -> Object:
        """Raises ``ApiError``."""
        return await self._call("GET", self.path(kind, name))

    async def list(self, kind: str, selector: str = "", fields: str = "") -> tuple[list[Object], str]:
        """All that carry the labels, and the version they were read at. Raises ``ApiError``."""
        told = await self._call("GET", self.path(kind), _selected(selector, fields))
        return list(told["items"]), str(told["metadata"].get("resourceVersion", ""))

    async def create(self, kind: str, body: Object) -> Object:
        """Raises ``ConflictError`` where it is there already."""
        return await self._call("POST", self.path(kind), body=body)

    async def patch(self, kind: str, name: str, body: Object, part: str = "") -> Object:
        """Merge into an object; with a ``metadata.resourceVersion`` it must be as read, else ``ConflictError``."""
        return await self._call("PATCH", self.path(kind, name, part), body=body)

    async def replace(self, kind: str, name: str, body: Object) -> Object:
        """Put another in place of the version that the body names. Raises ``ConflictError``."""
        return await self._call("PUT", self.path(kind, name), body=body)

    async def delete(self, kind: str, name: str, grace_s: int | None = None) -> None:
        """Delete it, if it is there. Raises ``ApiError``."""
        query = [] if grace_s is None else [("gracePeriodSeconds", str(grace_s))]
        with contextlib.suppress(NotFoundError):
            await self._call("DELETE", self.path(kind, name), query)

    async def bind(self, pod: str, node: str) -> None:
        """Put a pod that no scheduler has placed on a node. Raises ``ConflictError`` where it has one."""
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        await self._call("POST", self.path("pods", pod, "binding"), body=body)

    async def watch(self, kind: str, version: str, selector: str = "", fields: str = "") -> AsyncIterator[Object]:
        """Events since a version, until the server or the network ends it. Raises ``GoneError``, ``ApiError``."""
        query = [*_selected(selector, fields), ("watch", "true"), ("timeoutSeconds", str(WATCH_S))]
        query += [("resourceVersion", version)] if version else []
        timeout = aiohttp.ClientTimeout(sock_connect=CALL_TIMEOUT_S, sock_read=2 * WATCH_S)
        try:
            answer = (await self._send("GET", self.path(kind), query, None, timeout)).response
            async with answer:
                if answer.status >= 400:
                    raise _error(answer.status, await answer.text())
                async for line in answer.content:
                    if not line.strip():
                        continue
                    event: Object = json.loads(line)
                    if event["type"] == "ERROR":
                        raise _error(int(event["object"].get("code", 500)), json.dumps(event["object"]))
                    yield event
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return  # it may have lost events; who watches lists again

    # --- calls -------------------------------------------------------------------------------------------------------

    async def _call(self, method: str, path: str, query: Query | None = None, body: Object | None = None) -> Object:
        """One call, again where the server asks for that or the connection fails."""
        wait_s = FIRST_RETRY_S
        for attempt in range(RETRIES):
            last = attempt == RETRIES - 1
            try:
                answer = await self._send(method, path, query or [], body, CALL_TIMEOUT_S)
                text = (await answer.read()).decode()
            except (aiohttp.ClientError, TimeoutError) as error:
                if last:
                    raise DriverError(f"the API server does not answer {method} {path}: {error!r}") from None
            else:
                if answer.status < 300:
                    told: Object = json.loads(text)
                    return told
                if answer.status not in TRY_AGAIN or last:
                    raise _error(answer.status, text)
                with contextlib.suppress(TypeError, ValueError):
                    wait_s = float(answer.headers.get("retry-after"))
            await asyncio.sleep(min(wait_s, LONGEST_RETRY_S))
            wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    async def _send(self, method: str, path: str, query: Query, body: Object | None, timeout_s: Any) -> Any:
        api = await self._connect()
        # a status holds lists of conditions, which others write too: only a strategic merge knows them by their type
        patch = STRATEGIC_MERGE if path.endswith("/status") else MERGE
        headers = {"Accept": "application/json", "Content-Type": patch if method == "PATCH" else "application/json"}
        request = await api.param_serialize(
            method, path, query_params=query, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        return await api.call_api(*request, _request_timeout=timeout_s)


def _selected(selector: str, fields: str) -> Query:
    return [(name, value) for name, value in (("labelSelector", selector), ("fieldSelector", fields)) if value]


def _error(status: int, text: str) -> ApiError:
    try:
        message = str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        message = text[:300]
    return _ERRORS.get(status, ApiError)(status, f"the API server answers {status}: {message}")
