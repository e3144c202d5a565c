"""Jobs on a real system whose coordinator is killed, drained and started again: every request has
one result, and its tokens are those it would have had anyway."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from pipemax.client import JobInfo, JobRequest, Jobs, Submit
from pipemax.client import jobs as client_jobs
from pipemax.proto import PROTOCOL_VERSION
from pipemax.proto.messages import control
from pipemax.proto.messages.ingest import Finished, JobResult
from pipemax.proto.messages.registry import CONTROL
from pipemax.proto.rundir import socket_endpoint
from pipemax.proto.sockets import connect_dealer, identity_of
from pipemax.proto.wire import Codec, encode
from support.local_system import LocalSystem, greedy, small_config
from support.model_zoo import build_model, reference_tokens

COUNT = 60
Work = tuple[Path, list[JobRequest], list[list[int]]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    model_dir = build_model("llama", tmp_path_factory.mktemp("llama"))
    draw = random.Random(5)
    prompts = [[draw.randrange(3, 512) for _ in range(draw.randrange(1, 60))] for _ in range(COUNT)]
    counts = [draw.randrange(4, 40) for _ in prompts]
    requests = [
        JobRequest(
            note=b"%d" % n,
            request=Submit(request_id="r", prompt_token_ids=tuple(ids), sampling=greedy(count)),
        )
        for n, (ids, count) in enumerate(zip(prompts, counts, strict=True))
    ]
    return model_dir, requests, reference_tokens(model_dir, prompts, counts)


def wait_for(jobs: Jobs, condition: Callable[[JobInfo], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition(info := jobs.info("night")):
        assert time.monotonic() < deadline, info
        time.sleep(0.01)


def drain(system: LocalSystem) -> None:
    """As the launcher does for `pipemax down`."""
    with zmq.Context() as context:
        endpoint = socket_endpoint(system.run_dir, "control")
        launcher = connect_dealer(context, endpoint, CONTROL, identity_of("launcher"))
        hello = control.Hello(
            protocol=PROTOCOL_VERSION, role="launcher", index=0, pid=1, incarnation="x"
        )
        launcher.send(encode(hello))
        launcher.send(encode(control.Drain()))
        codec = Codec(CONTROL, at_binder=False)
        while True:
            assert launcher.poll(60_000), "the coordinator does not drain"
            if isinstance(codec.decode(launcher.recv()), control.Drained):
                break
        launcher.close(linger=0)


def test_a_job_outlives_coordinators(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_jobs, "_ASK_AGAIN_S", 0.2)
    model_dir, requests, expected = work
    config = small_config(
        model_dir, stages=2, device_blocks=40, max_num_batched_tokens=128, max_num_seqs=8
    )
    seen: list[JobResult] = []

    def look(jobs: Jobs) -> None:
        """Takes results up to now: none of them may change later."""
        while page := jobs.results("night", len(seen)).results:
            seen.extend(page)

    with LocalSystem(config) as system, Jobs(config.name) as jobs:
        jobs.open("night", b"about")
        for first in range(0, COUNT, 10):
            jobs.add("night", first, requests[first : first + 10])
            if first in (10, 40):
                system.kill("coordinator")
                system.start("coordinator")
        jobs.close_job("night", COUNT)
        for results in (6, 20):
            wait_for(jobs, lambda info, least=results: info.num_results >= least)  # type: ignore[misc]
            look(jobs)
            system.kill("coordinator")
            system.start("coordinator")
        wait_for(jobs, lambda info: info.num_results >= 30)
        drain(system)
        left = jobs.info("night")
        assert 30 <= left.num_results < COUNT, "what was not begun waits for the next start"
        assert left.state == "running"
        look(jobs)
        system.processes["coordinator"].terminate()
        system.processes.pop("coordinator").join()
        system.start("coordinator")
        wait_for(jobs, lambda info: info.state == "finished")
        look(jobs)
        assert jobs.results("night", 0).results == tuple(seen)
    assert Counter(result.seq for result in seen) == Counter(range(COUNT))
    for found in seen:
        assert found.note == b"%d" % found.seq
        assert isinstance(found.result, Finished)
        assert list(found.result.token_ids) == expected[found.seq]
