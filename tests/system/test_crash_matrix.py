"""Nothing is lost, whoever dies or hangs in the middle of a batch: every custom_id has its line
exactly once, and greedy tokens are those of an undisturbed run.

The suite strikes a few times; `make test-full PYTEST_ARGS=tests/system/test_crash_matrix.py` runs
the whole matrix: 500 requests, ten random instants for each victim.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from pipemax.services.tiny_model import make_demo_model
from support.crash_run import Blow, CrashRun, requests_of, tokens_by_id
from support.model_zoo import reference_tokens

NUM_REQUESTS = 500
INSTANTS = 10
STOP_S = 30.0
UP = ("-pp", 2, "--kv-cache-memory-bytes", "512KiB", "--kv-offloading-size", "32MiB",
      "--warm-up-s", 0.1, "--served-model-name", "demo", "--hung-after", 10,
      "--max-num-seqs", 16)  # fmt: skip
SAMPLER = ("--sampler-workers", 1)
"""In the whole matrix."""
VICTIMS = ("coordinator", "kv_daemon", "stage_worker 0", "stage_worker 1",
           "stage_worker.sampling 0", "launcher", "client")  # fmt: skip
PAIRS = (
    ("coordinator", "client"),
    ("coordinator", "stage_worker 1"),
    ("kv_daemon", "stage_worker 0"),
    ("stage_worker 0", "stage_worker 1"),
    ("stage_worker.sampling 0", "stage_worker 1"),
    ("launcher", "client"),
)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return ("--model", make_demo_model(tmp_path_factory.mktemp("demo")), *UP)


_undisturbed: dict[str, list[int]] = {}


def expected(arguments: tuple[object, ...], tmp_path: Path) -> dict[str, list[int]]:
    """Of an undisturbed run, which is made only once."""
    if not _undisturbed:
        folder = tmp_path / "undisturbed"
        folder.mkdir()
        outcome = CrashRun(folder, arguments, NUM_REQUESTS).run([])
        assert (outcome.client_runs, outcome.system_starts) == (1, 1)
        found = tokens_by_id(outcome)
        assert len(found) == NUM_REQUESTS
        _undisturbed.update(found)
    return _undisturbed


def of_transformers(model_dir: Path, count: int) -> dict[str, list[int]]:
    """The same tokens without starting a system."""
    requests = requests_of(count)
    bodies = [request["body"] for request in requests]
    answers = reference_tokens(
        model_dir,
        [body["prompt"] for body in bodies],
        [body["max_tokens"] for body in bodies],
        ignore_eos=True,
    )
    ids = [request["custom_id"] for request in requests]
    return dict(zip(ids, answers, strict=True))


def check(
    arguments: tuple[object, ...],
    blows: list[Blow],
    wanted: dict[str, list[int]],
    tmp_path: Path,
) -> Any:
    count = len(wanted)
    outcome = CrashRun(tmp_path, arguments, count).run(blows)
    assert outcome.struck, "nobody was struck"
    assert tokens_by_id(outcome) == wanted
    return outcome


def test_client_and_coordinator_die_in_one_batch(
    arguments: tuple[object, ...], tmp_path: Path
) -> None:
    blows = [Blow(0.2, ("client",)), Blow(0.5, ("coordinator",)), Blow(0.7, ("stage_worker 1",))]
    outcome = check(arguments, blows, of_transformers(Path(str(arguments[1])), 60), tmp_path)
    assert outcome.struck == ["client", "coordinator", "stage_worker 1"]


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("instant", range(INSTANTS))
@pytest.mark.parametrize("victims", [*((v,) for v in VICTIMS), *PAIRS], ids="+".join)
def test_killed(
    arguments: tuple[object, ...], tmp_path: Path, victims: tuple[str, ...], instant: int
) -> None:
    at = random.Random(f"{victims} {instant}").uniform(0.0, 0.98)
    wanted = expected(arguments, tmp_path)
    check((*arguments, *SAMPLER), [Blow(at, victims)], wanted, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("instant", range(2))
@pytest.mark.parametrize("victim", VICTIMS)
def test_stopped(arguments: tuple[object, ...], tmp_path: Path, victim: str, instant: int) -> None:
    at = random.Random(f"stop {victim} {instant}").uniform(0.0, 0.9)
    blow = Blow(at, (victim,), stop_s=STOP_S)
    check((*arguments, *SAMPLER), [blow], expected(arguments, tmp_path), tmp_path)
