"""The application: routes, and what is opened and closed with it."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipemax.client import Client
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.bridge import Bridge, ServedModel
from pipemax.services.serve.completions import Completions
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.guard import HANDLERS, Guard
from pipemax.services.serve.metrics import CONTENT_TYPE, ServeMetrics
from pipemax.services.serve.settings import ServeSettings


class Server:
    """What the endpoints share; made when the application starts."""

    def __init__(
        self, connect: Callable[[], Client], settings: ServeSettings, metrics: ServeMetrics
    ) -> None:
        self.bridge = Bridge(connect)
        self.completions = Completions(self.bridge, settings)
        self._metrics = metrics

    async def health(self, request: Request) -> Response:
        self.bridge.model  # noqa: B018  (raises)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        page = self._metrics.page(connected=self.bridge.is_connected, batches=Counter())
        return Response(page, headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        found = [_model(self.bridge.model)]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        served, asked = self.bridge.model, request.path_params["model"]
        if asked != served.name:
            text = f"model {asked!r:.200} is not served; this system serves {served.name!r}"
            raise ApiError(404, "model_not_found", text)
        return JSONResponse(_model(served))


def _model(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.since,
        "owned_by": "pipemax",
        "max_model_len": served.max_model_len,
    }


def make_app(connect: Callable[[], Client], settings: ServeSettings) -> Starlette:
    """The application for a system that `connect` connects to."""
    metrics = ServeMetrics()
    servers: list[Server] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server = Server(connect, settings, metrics)
        servers[:] = [server]
        server.bridge.start()
        try:
            yield
        finally:
            await server.bridge.stop()

    def route(path: str, endpoint: Callable[[Server, Request], object], method: str) -> Route:
        async def handle(request: Request) -> Response:
            return await endpoint(servers[0], request)  # type: ignore[misc, no-any-return]

        return Route(path, handle, methods=[method])

    app = Starlette(
        routes=[
            route("/health", Server.health, "GET"),
            route("/metrics", Server.metrics, "GET"),
            route("/v1/models", Server.models, "GET"),
            route("/v1/models/{model:path}", Server.model, "GET"),
            route(CHAT_URL, lambda server, request: server.completions.answer(request), "POST"),
            route(
                COMPLETIONS_URL, lambda server, request: server.completions.answer(request), "POST"
            ),
        ],
        middleware=[Middleware(Guard, settings=settings, metrics=metrics)],
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app
