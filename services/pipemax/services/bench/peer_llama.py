"""Runs llama.cpp's server: `python -m pipemax.services.bench.peer_llama SERVER [FLAGS]`. Speaks as
`peer_runner` does, to which the server is one more engine."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipemax.services.bench.peer_runner import Requests, Run, Settings, serve

_READY_S = 600.0
_LOOK_S = 0.1
_STOP_S = 10.0


def completion(port: int, ids: Sequence[int], count: int) -> int:
    """Output tokens of one request. Raises SystemExit when the server refuses it."""
    body = {
        "prompt": ids,
        "n_predict": count,
        "ignore_eos": True,
        "temperature": 0.0,
        "cache_prompt": False,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read()
    if response.status != http.HTTPStatus.OK:
        raise SystemExit(f"llama-server answered {response.status}: {text[:200]!r}")
    return int(json.loads(text)["tokens_predicted"])


@contextlib.contextmanager
def server(argv: Sequence[str], port: int) -> Iterator[None]:
    """Runs for the block, and is ready in it."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=sys.stderr) as process:
        try:
            _wait_ready(process, port)
            yield
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_ready(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"llama-server ended with status {process.returncode}")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LOOK_S * 10)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        time.sleep(_LOOK_S)
    raise SystemExit(f"llama-server was not ready within {_READY_S:g} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def version_of(binary: str) -> str:
    """What `--version` says of the build, or all of it."""
    said = subprocess.run(
        [binary, "--version"], capture_output=True, text=True, check=False, timeout=_STOP_S
    )
    text = said.stdout + said.stderr
    found = re.search(r"version:\s*(.+)", text)
    return found.group(1).strip() if found else " ".join(text.split())[:100] or "unknown"


def main() -> None:
    argv, port = sys.argv[1:], free_port()
    with contextlib.ExitStack() as stack:

        def open_server(settings: Settings) -> Run:
            stack.enter_context(server([*argv, "--host", "127.0.0.1", "--port", str(port)], port))
            pool = stack.enter_context(ThreadPoolExecutor(settings["parallel"]))

            def run(requests: Requests) -> list[int]:
                return list(pool.map(lambda one: completion(port, *one), requests))

            return run

        serve(open_server, lambda: version_of(argv[0]))


if __name__ == "__main__":
    main()
