"""The application: routes, and what is opened and closed with it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipemax.client import Client, Jobs
from pipemax.services.batch.openai_results import CHAT_URL, COMPLETIONS_URL
from pipemax.services.serve.batches import Batches
from pipemax.services.serve.book import Book
from pipemax.services.serve.bridge import Bridge, ServedModel
from pipemax.services.serve.completions import Completions
from pipemax.services.serve.errors import ApiError
from pipemax.services.serve.files import Files
from pipemax.services.serve.guard import HANDLERS, Guard
from pipemax.services.serve.metrics import CONTENT_TYPE, ServeMetrics
from pipemax.services.serve.openapi import describe
from pipemax.services.serve.settings import ServeSettings
from pipemax.services.serve.store import FileStore
from pipemax.services.serve.worker import Worker


@dataclass(frozen=True, slots=True)
class System:
    """What is served."""

    client: Callable[[], Client]
    jobs: Callable[[], Jobs]
    """Connect; raise as `Client` and `Jobs`."""
    folder: Path
    """For its files and batches; made private."""


class Server:
    """What the endpoints share; made when the application starts."""

    def __init__(
        self, system: System, store: FileStore, settings: ServeSettings, metrics: ServeMetrics
    ) -> None:
        self.store = store
        self.book = Book(system.folder)
        self.bridge = Bridge(system.client)
        self.worker = Worker(self.book, self.store, system.jobs)
        self.completions = Completions(self.bridge, settings)
        self.files = Files(
            self.store, settings, is_needed=self.book.reads, on_kept=metrics.uploaded.inc
        )
        self.batches = Batches(self.book, self.store, self.worker, settings)
        self._metrics = metrics
        self._settings = settings

    def start(self) -> None:
        self.bridge.start()
        self.worker.start()

    async def stop(self) -> None:
        await self.bridge.stop()
        await asyncio.to_thread(self.worker.stop)

    async def health(self, request: Request) -> Response:
        self.bridge.model  # noqa: B018  (raises)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        page = self._metrics.page(connected=self.bridge.is_connected, batches=self.book.totals())
        return Response(page, headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        name = self.bridge.model.name if self.bridge.is_connected else None
        return JSONResponse(describe(name, with_keys=bool(self._settings.keys)))

    async def models(self, request: Request) -> Response:
        found = [_model(self.bridge.model)]
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        served, asked = self.bridge.model, request.path_params["model"]
        if asked != served.name:
            text = f"model {asked!r:.200} is not served; this system serves {served.name!r}"
            raise ApiError(404, "model_not_found", text)
        return JSONResponse(_model(served))


Handler = Callable[[Request], Awaitable[Response]]
ROUTES: tuple[tuple[str, str, Callable[[Server], Handler]], ...] = (
    ("GET", "/health", lambda server: server.health),
    ("GET", "/metrics", lambda server: server.metrics),
    ("GET", "/openapi.json", lambda server: server.openapi),
    ("GET", "/v1/models", lambda server: server.models),
    ("GET", "/v1/models/{model:path}", lambda server: server.model),
    ("POST", CHAT_URL, lambda server: server.completions.answer),
    ("POST", COMPLETIONS_URL, lambda server: server.completions.answer),
    ("POST", "/v1/files", lambda server: server.files.create),
    ("GET", "/v1/files", lambda server: server.files.list),
    ("GET", "/v1/files/{file_id}", lambda server: server.files.retrieve),
    ("DELETE", "/v1/files/{file_id}", lambda server: server.files.delete),
    ("GET", "/v1/files/{file_id}/content", lambda server: server.files.content),
    ("POST", "/v1/batches", lambda server: server.batches.create),
    ("GET", "/v1/batches", lambda server: server.batches.list),
    ("GET", "/v1/batches/{batch_id}", lambda server: server.batches.retrieve),
    ("POST", "/v1/batches/{batch_id}/cancel", lambda server: server.batches.cancel),
)


def _model(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.since,
        "owned_by": "pipemax",
        "max_model_len": served.max_model_len,
    }


def make_app(system: System, settings: ServeSettings) -> Starlette:
    """The application, to be started once. Raises ConfigError when the system's folder cannot be
    used, or another server has it."""
    store = FileStore(system.folder)
    metrics = ServeMetrics()
    servers: list[Server] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            server = Server(system, store, settings, metrics)
            servers.append(server)
            server.start()
            try:
                yield
            finally:
                await server.stop()
        finally:
            store.close()

    def route(path: str, methods: dict[str, Callable[[Server], Handler]]) -> Route:
        async def handle(request: Request) -> Response:
            method = "GET" if request.method == "HEAD" else request.method
            return await methods[method](servers[0])(request)

        return Route(path, handle, methods=list(methods))

    paths: dict[str, dict[str, Callable[[Server], Handler]]] = {}
    for method, path, endpoint in ROUTES:
        paths.setdefault(path, {})[method] = endpoint
    app = Starlette(
        routes=[route(*entry) for entry in paths.items()],
        middleware=[Middleware(Guard, settings=settings, metrics=metrics)],
        exception_handlers=HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app
