"""`pipemax serve` in a thread, for tests: the real application behind a real socket."""

import socket
import threading
import time
from pathlib import Path

import uvicorn

from pipemax.client import Client, Jobs
from pipemax.coordinator.journal_file import state_root
from pipemax.services.serve.app import System, make_app
from pipemax.services.serve.settings import ServeSettings

_PATIENCE_S = 150.0
"""Until the system behind it is ready, on a busy machine."""


class HttpServer:
    """Context manager. Serves the system at `endpoint`, or of that `name`."""

    def __init__(
        self,
        *,
        name: str = "default",
        endpoint: str | None = None,
        settings: ServeSettings | None = None,
        folder: Path | None = None,
        wait_for_system: bool = True,
        timeout_s: float = 10.0,
    ) -> None:
        self._name, self._endpoint = name, endpoint
        self._settings = settings or ServeSettings()
        self._folder = folder or state_root() / "serve"
        self._wait = wait_for_system
        self._timeout_s = timeout_s
        self._failure: BaseException | None = None

    def __enter__(self) -> "HttpServer":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        system = System(self._client, self._jobs, self._folder)
        self.app = make_app(system, self._settings)
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_config=None, lifespan="on", ws="none", http="h11")
        )
        self._thread = threading.Thread(target=self._run, name="http-server")
        self._thread.start()
        deadline = time.monotonic() + _PATIENCE_S
        while not (self._server.started and (self._ready() or not self._wait)):
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self.__exit__()
                raise AssertionError("the server did not start") from self._failure
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        if self._failure is not None:
            raise self._failure

    def _client(self) -> Client:
        return Client(self._name, endpoint=self._endpoint, timeout_s=self._timeout_s)

    def _jobs(self) -> Jobs:
        return Jobs(self._name, endpoint=self._endpoint, timeout_s=self._timeout_s)

    def _ready(self) -> bool:
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return b" 200 " in connection.recv(100)

    def _run(self) -> None:
        try:
            self._server.run(sockets=[self._listener])
        except BaseException as error:
            self._failure = error
