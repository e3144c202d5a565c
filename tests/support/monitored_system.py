"""A small system at work for tests that watch it: modelled GPUs, a job that does not end by itself,
KV that travels."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipemax.client import JobRequest, Jobs, Submit
from pipemax.proto.rundir import METRICS_PORT_FILE
from support.command import eventually
from support.local_system import LocalSystem, greedy
from support.modelled_system import modelled_config

JOB = "night"
_BATCH = 100
_SMALL: dict[str, Any] = {"device_blocks": 60, "host_blocks": 2000}


def http_target(system: LocalSystem) -> str:
    """host:port of its HTTP port."""
    return f"127.0.0.1:{(system.run_dir / METRICS_PORT_FILE).read_text().strip()}"


@contextmanager
def busy_system(stages: int = 2, requests: int = 400, **settings: Any) -> Iterator[LocalSystem]:
    """Ready, and the first results of its job are there."""
    config = modelled_config(stages=stages, **{**_SMALL, **settings})
    with LocalSystem(config) as system:
        with system.client() as client:
            system.wait_ready(client)
        with Jobs(config.name) as jobs:
            jobs.open(JOB)
            for first in range(0, requests, _BATCH):
                jobs.add(JOB, first, [_request(n) for n in range(first, first + _BATCH)])
            jobs.close_job(JOB, requests)
            assert eventually(lambda: jobs.info(JOB).num_results > 0, 60)
            yield system


def _request(number: int) -> JobRequest:
    prompt = tuple(range(5 + number % 50, 85 + number % 90))
    submit = Submit(
        request_id=str(number),
        prompt_token_ids=prompt,
        sampling=greedy(40 + number % 60, ignore_eos=True),
    )
    return JobRequest(note=b"", request=submit)
