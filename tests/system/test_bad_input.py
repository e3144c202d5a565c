"""Bad input: one line that says what to do, a status that is not zero, nothing left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipemax.proto.rundir import runtime_root
from pipemax.services.tiny_model import make_demo_model
from support.command import run_pipemax
from support.leaks import our_shm_files

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("demo"))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    (folder / "config.json").write_text(json.dumps(config))


def nothing(folder: Path) -> None:
    pass


CANNOT_START: tuple[tuple[Change, tuple[object, ...], str], ...] = (
    (shutil.rmtree, (), "does not exist"),
    (remove_weights, (), "safetensors"),
    (cut_weights, (), "truncated"),
    (other_architecture, (), "WhisperForConditionalGeneration"),
    (nothing, ("-pp", 5), "4 layers"),
    (nothing, ("--kv-cache-memory-bytes", "20KiB"), "too small"),
    (
        nothing,
        ("--kv-cache-memory-bytes", "1MiB", "--max-model-len", 2000),
        "too small: one request for --max-model-len 2000",
    ),
    (nothing, ("--max-model-len", 99999), "99999"),
    (nothing, ("--device", "tpu"), "--device tpu: choose cpu, cuda or modelled"),
    (nothing, ("--device", "cuda", "--gpus", "99"), "--device cuda"),
)


@pytest.mark.parametrize(
    ("command", "change", "flags", "says"),
    [
        # Both commands read the same options in the same way: the suite tries one with each.
        pytest.param(command, *case, marks=[] if number % 2 == turn else [pytest.mark.full])
        for number, case in enumerate(CANNOT_START)
        for turn, command in enumerate(("up", "run-batch"))
    ],
)
def test_what_cannot_start(
    good_model: Path, tmp_path: Path, command: str, change: Change, flags: tuple[object], says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good_model, folder)
    change(folder)
    jobs = write_lines(tmp_path / "in.jsonl", [line("a")])
    files = ("-i", jobs, "-o", tmp_path / "out.jsonl") if command == "run-batch" else ()
    check_refused(run_pipemax(command, "--model", folder, *flags, *files), says)


def check_refused(done: object, says: str) -> None:
    stderr, status = getattr(done, "stderr", ""), getattr(done, "returncode", None)
    assert status not in (0, None)
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert says.lower() in stderr.lower()
    assert "Traceback" not in stderr
    assert not list(runtime_root().glob("*/*.sock"))


def test_output_is_checked_before_the_model_loads(good_model: Path, tmp_path: Path) -> None:
    jobs = write_lines(tmp_path / "in.jsonl", [line("a")])
    cut_weights_after = tmp_path / "model"
    shutil.copytree(good_model, cut_weights_after)
    cut_weights(cut_weights_after)  # would be the error if the model came first
    out = tmp_path / "missing" / "out.jsonl"
    done = run_pipemax("run-batch", "--model", cut_weights_after, "-i", jobs, "-o", out)
    check_refused(done, "missing")


def line(custom_id: str, **body: object) -> str:
    values = {"model": "demo", "prompt": "Water has no plan.", "max_tokens": 5, "temperature": 0}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions"}
    return json.dumps(request | {"body": values | body})


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def test_bad_lines_get_error_lines_and_the_others_run(good_model: Path, tmp_path: Path) -> None:
    before = our_shm_files()
    bad = {
        "not JSON": '{"custom_id": "broken", ',
        "unknown field": line("unknown", best_off=3),
        "negative": line("negative", max_tokens=-1),
        "too long": line("long", prompt=[5] * 3000),
        "not implemented": line("suffix", suffix="."),
        "wrong model": line("model", model="other"),
        "twice": line("good-1"),
    }
    good = [line(f"good-{i}") for i in range(6)]
    jobs = write_lines(tmp_path / "in.jsonl", [*good[:3], *bad.values(), *good[3:]])
    out = tmp_path / "out.jsonl"
    done = run_pipemax(
        "run-batch", "--model", good_model, "--served-model-name", "demo", "-i", jobs, "-o", out
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(text) for text in out.read_text().splitlines()]
    assert len(results) == len(good) + len(bad)
    served = [r for r in results if r["error"] is None]
    assert sorted(r["custom_id"] for r in served) == [f"good-{i}" for i in range(6)]
    assert all(r["response"]["body"]["usage"]["completion_tokens"] for r in served)
    texts = {r["custom_id"]: r["error"]["message"] for r in results if r["error"] is not None}
    assert "best_off" in texts["unknown"]
    assert "max_tokens" in texts["negative"]
    assert "3000" in texts["long"]
    assert "suffix" in texts["suffix"]
    assert "other" in texts["model"]
    assert "JSON" in texts[None]  # type: ignore[index]
    assert "good-1" in texts
    assert our_shm_files() == before
