"""The operator's routes of a gateway among several: what it is asked, it asks the controller that leads."""

from collections.abc import Callable

import httpx
from fastapi import APIRouter, Request, Response

from proxy.errors import ApiError

TIMEOUT_S = 10.0
PASSED = ("authorization", "content-type")


def admin_relay(leader_url: Callable[[], str]) -> APIRouter:
    """Routes that answer as the leader does; 503 where none is known or it does not answer."""
    routes = APIRouter()

    @routes.api_route("/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
    async def ask(path: str, request: Request) -> Response:
        """What the controller that leads answers."""
        url = leader_url()
        if not url:
            raise ApiError(503, "No controller leads yet", "no_leader")
        headers = {name: value for name in PASSED if (value := request.headers.get(name))}
        try:
            async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False) as client:
                answer = await client.request(
                    request.method,
                    f"{url}/admin/{path}",
                    params=request.query_params,
                    headers=headers,
                    content=await request.body(),
                )
        except httpx.HTTPError as error:
            raise ApiError(503, f"The controller at {url} does not answer: {error!r}", "no_leader") from None
        return Response(answer.content, answer.status_code, media_type=answer.headers.get("content-type"))

    return routes
