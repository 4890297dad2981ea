"""The controller's own HTTP: health, metrics, and the operator's routes, which are the leader's to answer.

``/health`` is 200 while the process runs, ``/ready`` while it could lead or leads: a standby is ready.
"""

from collections.abc import Callable

from fastapi import Depends, FastAPI, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from dynamollm.admin import admin_routes
from dynamollm.commander import Commander
from dynamollm.term import ControllerTerm
from proxy import errors
from proxy.admission import is_known
from proxy.app import error_response
from proxy.errors import ApiError


def controller_app(commander: Commander[ControllerTerm], keys: tuple[str, ...], registry: CollectorRegistry) -> FastAPI:
    """The application; ``keys`` as for the gateways."""
    app = FastAPI(title="DynamoLLM controller", description="Commands the cluster, or stands by.")

    def leading() -> ControllerTerm:
        if commander.term is None:
            raise ApiError(503, "This controller stands by: ask the one that leads, or a gateway", "not_leading")
        return commander.term

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """200 while the process runs."""
        return Response(status_code=200)

    @app.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """200 while the lease can be asked for: of a leader and of a standby."""
        return Response(status_code=200 if commander.candidate.reachable else 503)

    @app.get("/metrics", tags=["operation"])
    async def exposition() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    routes = admin_routes(leading, lambda: leading().reload())
    app.include_router(routes, prefix="/admin", tags=["operation"], dependencies=[Depends(authorizer(keys))])
    return app


def authorizer(keys: tuple[str, ...]) -> Callable[[Request], None]:
    """A dependency that raises ``ApiError`` 401 for a caller without one of the keys."""
    encoded = tuple(key.encode() for key in keys)

    def authorize(request: Request) -> None:
        if not is_known(encoded, request.headers.get("authorization", "").encode("latin-1")):
            raise errors.unauthorized()

    return authorize
