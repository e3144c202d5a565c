"""`pipemax up` and what people do to it: other clients, kills, signals, a second start."""

import random
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from pipemax.client import Client, Submit
from pipemax.proto.rundir import run_dir_of, socket_endpoint
from pipemax.services.tiny_model import make_demo_model
from support.background import Background
from support.command import Up, eventually, run_pipemax
from support.leaks import our_shm_files
from support.local_system import greedy, tokens_of
from support.model_zoo import reference_tokens
from support.promtool import check_metrics

MINIMAL_CLIENT = Path(__file__).parents[2] / "ops" / "examples" / "minimal_client.py"
SMALL = ("-pp", 2, "--kv-cache-memory-bytes", "1MiB", "--kv-offloading-size", "32MiB",
         "--warm-up-s", 0.1)  # fmt: skip
GONE_WITHIN_S = 5.0
"""What we promise when the launcher is killed."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"))


def test_a_running_system_one_whose_launcher_is_killed_and_the_next_that_drains(
    model_dir: Path,
) -> None:
    before = our_shm_files()
    with Up("--model", model_dir, "--served-model-name", "demo", *SMALL) as up:
        check_what_users_see(model_dir, up)
        assert len(up.family) == 4
        up.process.kill()
        assert eventually(lambda: not up.family, GONE_WITHIN_S)
    assert our_shm_files() == before
    with Up("--model", model_dir, *SMALL) as again:
        check_drain(again)


def check_what_users_see(model_dir: Path, up: Up) -> None:
    endpoint = socket_endpoint(run_dir_of("default"), "ingest")
    minimal = subprocess.run(
        [sys.executable, MINIMAL_CLIENT, endpoint],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "connected to demo" in minimal.stdout
    assert "text finished" in minimal.stdout
    assert "ids finished" in minimal.stdout
    url = re.search(r"http://\S+/metrics", up.ready_line)
    assert url is not None
    with urllib.request.urlopen(url[0], timeout=10) as answer:
        exposition = answer.read().decode()
    check_metrics(exposition)
    assert "pipemax_stage_seconds_total" in exposition
    second = run_pipemax("up", "--model", model_dir, *SMALL)
    assert second.returncode != 0
    assert "already running" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    assert "ready" in run_pipemax("status").stdout


def check_drain(up: Up) -> None:
    """What was accepted is finished after SIGTERM, and nothing more is taken."""
    sampling = greedy(400, ignore_eos=True)
    with Client() as client, Client() as watcher:
        batch = Background(lambda: client.generate([[5, 6, 7]] * 4, sampling))
        assert eventually(lambda: watcher.status().requests_running == 4, 60)
        up.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: watcher.status().phase == "draining", 10)
        (late,) = watcher.generate([[5, 6, 7]], sampling)
        assert late.error_code == "draining"
        completions = batch.outcome()
        assert isinstance(completions, list)
        assert [len(tokens) for tokens in tokens_of(completions)] == [400] * 4
        assert up.process.wait(20) == 0


def end_by_down(up: Up, client: Client) -> None:
    down = run_pipemax("down")
    assert down.returncode == 0
    assert up.process.wait(20) == 0
    assert not up.family


def end_by_sigint(up: Up, client: Client) -> None:
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(20) == 0


def end_at_a_second_signal(up: Up, client: Client) -> None:
    """The first one waits for what was accepted."""
    long = greedy(1000, ignore_eos=True)
    for _ in range(20):
        client.submit(
            Submit(request_id=client.new_request_id(), prompt_token_ids=(5, 6, 7), sampling=long)
        )
    up.process.send_signal(signal.SIGINT)
    assert not eventually(lambda: up.process.poll() is not None, 0.5)
    up.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: up.process.poll() is not None, 10)
    assert not up.family


@pytest.mark.parametrize(
    ("victim", "signum", "end"),
    [
        ("stage_worker 1", signal.SIGSTOP, end_at_a_second_signal),
        ("coordinator", signal.SIGKILL, end_by_down),
        pytest.param("stage_worker 1", signal.SIGKILL, end_by_sigint, marks=pytest.mark.full),
        pytest.param("kv_daemon", signal.SIGSTOP, end_by_sigint, marks=pytest.mark.full),
    ],
)
def test_a_process_that_dies_or_hangs_is_replaced_and_the_batch_ends_right(
    model_dir: Path,
    victim: str,
    signum: signal.Signals,
    end: Callable[[Up, Client], None],
) -> None:
    draw = random.Random(1)
    prompts = [[draw.randrange(10, 1000) for _ in range(40)] for _ in range(8)]
    counts = [150] * len(prompts)
    expected = reference_tokens(model_dir, prompts, counts)
    with (
        Up("--model", model_dir, *SMALL, "--hung-after", "3") as up,
        Client() as client,
        Client() as watcher,
    ):
        before = up.child(victim)
        batch = Background(lambda: client.generate(prompts, [greedy(n) for n in counts]))
        assert eventually(lambda: watcher.status().generation_tokens > 200, 60)
        before.send_signal(signum)
        completions = batch.outcome()
        assert isinstance(completions, list)
        assert tokens_of(completions) == expected
        assert victim == "coordinator" or watcher.status().epoch == 2
        assert up.child(victim).pid != before.pid
        end(up, client)
