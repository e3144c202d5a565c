"""Stands in for a process of the system in launcher tests; run as a script.

`fake_process.py ROLE BEHAVIOUR --run-dir D --parent-pipe-fd N`. The coordinator answers as the real
one does, as soon as every other fake has left its pid file in D; the others just live. Behaviours:

- `live`: until TERM;
- `stubborn`: ignores TERM;
- `crash`: exits with status 3 and a last word;
- `crash-later`: exits with status 3 when D/crash appears;
- `fatal`: exits as a process does whose settings cannot work;
- `never-ready`: lives, but leaves no pid file;
- `never-drained` (coordinator): does not answer Drain.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import zmq
from msgspec.structs import fields

from pipemax.proto.config import load_config
from pipemax.proto.errors import ModelError
from pipemax.proto.messages import control, ingest
from pipemax.proto.messages.registry import CONTROL, INGEST
from pipemax.proto.process import run_process
from pipemax.proto.rundir import METRICS_PORT_FILE, socket_endpoint
from pipemax.proto.sockets import bind_router
from pipemax.proto.wire import Codec, encode


def pid_file(run_dir: Path, name: str) -> Path:
    return run_dir / "logs" / f"{name}.pid"


def live(run_dir: Path, name: str, behaviour: str) -> None:
    if behaviour == "fatal":
        raise ModelError("the model is a teapot;\nuse another")
    if behaviour == "crash":
        sys.stderr.write("a traceback\nValueError: last words\n\n")
        sys.stderr.flush()
        os._exit(3)
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour != "never-ready":
        pid_file(run_dir, name).write_text(str(os.getpid()))
    while True:
        if behaviour == "crash-later" and (run_dir / "logs" / "crash").exists():
            os._exit(3)
        time.sleep(0.01)


class FakeCoordinator:
    def __init__(self, run_dir: Path, behaviour: str) -> None:
        self.run_dir = run_dir
        self.drains = behaviour != "never-drained"
        context = zmq.Context[zmq.Socket[bytes]]()
        self.control = bind_router(context, socket_endpoint(run_dir, "control"), CONTROL)
        self.ingest = bind_router(context, socket_endpoint(run_dir, "ingest"), INGEST)
        config = load_config(run_dir)
        self.others = ["kv-daemon", *(f"stage-{i}" for i in range(config.pipeline_parallel_size))]
        self.launcher: bytes | None = None
        self.announced: dict[str, int] = {}
        (run_dir / METRICS_PORT_FILE).write_text("4711")

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.control, zmq.POLLIN)
        poller.register(self.ingest, zmq.POLLIN)
        while True:
            for socket, _ in poller.poll(10):
                peer, frame = socket.recv_multipart()
                channel = CONTROL if socket is self.control else INGEST
                self.answer(peer, Codec(channel, at_binder=True).decode(frame))
            pids = self.pids()
            if self.launcher and len(pids) == len(self.others) and pids != self.announced:
                self.announced = pids
                self.control.send_multipart((self.launcher, encode(control.SystemReady(epoch=1))))

    def pids(self) -> dict[str, int]:
        found = {}
        for name in self.others:
            path = pid_file(self.run_dir, name)
            text = path.read_text() if path.exists() else ""
            if text and Path(f"/proc/{text}").exists():
                found[name] = int(text)
        return found

    def answer(self, peer: bytes, message: object) -> None:
        match message:
            case control.Hello():
                self.launcher = peer
                self.control.send_multipart((peer, encode(control.Welcome(instance_id="fake"))))
            case control.Drain():
                (self.run_dir / "logs" / "drained").touch()
                if self.drains:
                    self.control.send_multipart((peer, encode(control.Drained())))
            case ingest.StatusQuery():
                missing = tuple(name for name in self.others if name not in self.pids())
                self.ingest.send_multipart((peer, encode(status(missing))))


def status(missing: tuple[str, ...]) -> ingest.Status:
    known = {
        "instance_id": "fake",
        "phase": "starting",
        "model_name": "fake",
        "missing": missing,
        "stages": (),
        "requests_running": 7,
    }
    zeros = {field.name: 0 for field in fields(ingest.Status) if field.required}
    return ingest.Status(**(zeros | known))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("behaviour")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--parent-pipe-fd", type=int)
    options = parser.parse_args()

    def body(run_dir: Path, index: int) -> None:
        if options.name == "coordinator":
            FakeCoordinator(run_dir, options.behaviour).run()
        live(run_dir, options.name, options.behaviour)

    return run_process(options.name, body, options.run_dir, 0, options.parent_pipe_fd)


if __name__ == "__main__":
    sys.exit(main())
