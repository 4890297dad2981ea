"""The FastAPI application: models, health, metrics, documentation and errors.

The relayed routes are listed here for their documentation, but served by ``proxy.protocol`` before a request becomes
ASGI; one that arrives here is on a server that does not run that protocol, and is told so.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from proxy import errors
from proxy.errors import ApiError, phrase
from proxy.gateway import Gateway
from proxy.openapi import CHAT_OPERATION, COMPLETION_OPERATION
from proxy.services import ServedModel


def create_app(gateway: Gateway, admin: APIRouter | None = None) -> FastAPI:
    """The application beside the relayed path of ``gateway``; it starts and stops the gateway with itself.

    ``admin`` holds further routes, for operators; they are under ``/admin`` and want an API key as the others do.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        gateway.start()
        yield
        await gateway.stop()

    app = FastAPI(
        title="DynamoLLM gateway",
        description="OpenAI-compatible endpoint that serves within latency SLOs at the least energy.",
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    _add_errors(app)
    _add_models(app, gateway)
    _add_health(app, gateway)
    _add_relayed(app)
    if admin is not None:
        app.include_router(admin, prefix="/admin", tags=["operation"], dependencies=[Depends(_authorizer(gateway))])
    return app


def error_response(error: ApiError) -> Response:
    """An error as the application answers it."""
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers, "application/json")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        response = error_response(ApiError(error.status_code, str(error.detail), phrase(error.status_code)))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return error_response(errors.bad_request(str(first["msg"]), ".".join(map(str, first["loc"]))))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "The gateway failed to answer this request", "Internal Server Error"))


def _authorizer(gateway: Gateway) -> Callable[[Request], None]:
    def authorize(request: Request) -> None:
        gateway.authorize(request.headers.get("authorization", "").encode("latin-1"))

    return authorize


def _add_models(app: FastAPI, gateway: Gateway) -> None:
    authorize = _authorizer(gateway)

    def card(model: ServedModel) -> dict[str, object]:
        return {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": "dynamollm",
            "max_model_len": model.max_model_len,
        }

    @app.get("/v1/models", tags=["OpenAI"], dependencies=[Depends(authorize)])
    async def models() -> dict[str, object]:
        """Every model served."""
        return {"object": "list", "data": [card(model) for model in gateway.services.directory.models().values()]}

    @app.get("/v1/models/{model:path}", tags=["OpenAI"], dependencies=[Depends(authorize)])
    async def model(model: str) -> dict[str, object]:
        """One model."""
        served = gateway.services.directory.models().get(model)
        if served is None:
            raise errors.model_not_found(model)
        return card(served)


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    directory, metrics = gateway.services.directory, gateway.services.metrics

    def state(served: bool) -> Response:
        if gateway.draining:
            return error_response(errors.shutting_down())
        return Response(status_code=200) if served else error_response(errors.unreachable())

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """200 while a request for at least one model could be served."""
        return state(any(map(directory.servable, directory.models())))

    @app.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """200 while requests for every model could be served."""
        return state(all(map(directory.servable, directory.models())))

    @app.get("/metrics", tags=["operation"])
    async def exposition() -> Response:
        """Metrics in Prometheus' text format."""
        page = []
        for part in metrics.answer():
            page.append(part)
            await asyncio.sleep(0)  # a page of thousands of samples takes milliseconds: streams go on meanwhile
        return Response(b"".join(page), media_type=CONTENT_TYPE_LATEST)


def _add_relayed(app: FastAPI) -> None:
    async def not_relayed() -> Response:
        message = "This server does not run the gateway's protocol: start it with `dynamollm serve`"
        raise ApiError(501, message, "not_implemented")

    for path, summary, operation in (
        ("/v1/chat/completions", "Create a chat completion", CHAT_OPERATION),
        ("/v1/completions", "Create a completion", COMPLETION_OPERATION),
    ):
        app.add_api_route(
            path,
            not_relayed,
            methods=["POST"],
            summary=summary,
            tags=["OpenAI"],
            openapi_extra=operation,
        )
