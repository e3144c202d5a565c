"""The command line as a user meets it: separate processes, exit statuses, one line on stderr."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipemax.proto.config import save_config
from pipemax.proto.rundir import RunLock, create_run_dir
from pipemax.services.cli import main
from pipemax.services.cli.options import EngineOptions, takes_engine_options
from support.fake_coordinator import FakeCoordinator, finished
from support.fake_system import fake_config

COMMANDS = (
    "up",
    "down",
    "status",
    "run-batch",
    "submit",
    "jobs",
    "results",
    "cancel",
    "keys",
    "demo",
    "plan",
    "simulate",
    "collect-env",
    "version",
)


def pipemax(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipemax", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], status: int, text: str) -> None:
    assert done.returncode == status, done
    assert done.stdout == ""
    assert done.stderr.startswith("pipemax: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert text in done.stderr


def test_help_names_every_command_and_no_command_is_a_usage_error() -> None:
    done = pipemax("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_heavy_library(command: str) -> None:
    program = (
        "import sys\n"
        "from pipemax.services.cli import main\n"
        f"sys.argv = ['pipemax', '{command}', '--help']\n"
        "status = main()\n"
        "heavy = {'torch', 'transformers', 'numba', 'numpy', 'zmq'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"Usage: pipemax {command}" in done.stdout


BENCH = "pipemax.services.bench."
MEASURES_KERNELS = (BENCH + "attention", BENCH + "cores_child", BENCH + "parts_child")
"""They run in processes of their own, which `pipemax bench` starts."""


def test_no_module_of_the_services_loads_torch() -> None:
    program = (
        "import sys, pkgutil, importlib\n"
        "import pipemax.services, pipemax.client\n"
        "for package in (pipemax.services, pipemax.client):\n"
        "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        f"        if found.name not in {MEASURES_KERNELS}:\n"
        "            importlib.import_module(found.name)\n"
        "heavy = {'torch', 'transformers', 'numba'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("up", "--frobnicate"), "No such option: --frobnicate"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("up", "--block-size", "x"), "Invalid value for '--block-size'"),
        (("up",), "--model is missing"),
        (("up", "--model", "/no/such/folder"), "/no/such/folder does not exist"),
        (("up", "--model", "/tmp", "--device", "cuda"), "/tmp has no config.json"),
        (("run-batch", "-o", "x"), "Missing option '--input-file'"),
        (("run-batch", "-i", "/no/such", "-o", "x"), "cannot read /no/such"),
        (("run-batch", "-i", __file__, "-o", "/no/such/out"), "cannot write /no/such/out"),
        (("run-batch", "-i", __file__, "-o", "/dev/null", "--name", "ghost"), "no system named"),
        (("run-batch", "-i", __file__, "-o", "/dev/null", "--model", "/no/such"), "does not exist"),
        (("run-batch", "-i", __file__, "-o", "/dev/null"), "no system named 'default' is running"),
    ],
)
def test_what_the_user_can_correct_exits_with_2(arguments: tuple[str, ...], text: str) -> None:
    assert_one_line(pipemax(*arguments), 2, text)


def test_down_and_status_without_a_system_say_so(runtime_dir: Path) -> None:
    assert_one_line(pipemax("down", "--name", "ghost"), 1, "no system named 'ghost' is running")
    assert_one_line(pipemax("status", "--name", "ghost"), 1, "'ghost' is not running")
    assert list(runtime_dir.iterdir()) == []


def test_batch_on_a_running_system_takes_no_engine_flags(runtime_dir: Path) -> None:
    lock = RunLock(create_run_dir("mine"))
    batch = ("run-batch", "-i", __file__, "-o", "/dev/null", "--name", "mine")
    done = pipemax(*batch, "--block-size", "8", "--model", "/m")
    lock.release()
    assert_one_line(done, 2, "leave out --model, --block-size")


@pytest.mark.parametrize(("models", "status"), [(("fake", "other"), 0), (("other", "other"), 1)])
def test_batch_without_a_model_runs_on_the_running_system_and_fails_when_every_line_does(
    models: tuple[str, ...], status: int, tmp_path: Path
) -> None:
    lines = [
        {
            "custom_id": f"id-{n}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": model, "prompt": "water"},
        }
        for n, model in enumerate(models)
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_dir = create_run_dir("default")
    lock = RunLock(run_dir)
    save_config(fake_config("default"), run_dir)
    try:
        with FakeCoordinator(run_dir / "ingest.sock", finished):
            done = pipemax("run-batch", "-i", str(source), "-o", str(out))
    finally:
        lock.release()
    assert done.returncode == status, done.stderr
    assert len(out.read_text().splitlines()) == 2
    assert f"{models.count('other')} of them error lines" in done.stdout
    if status:
        assert done.stderr.startswith("pipemax: no line could be served; the first: line 1: model")
        assert "--served-model-name" in done.stderr


def test_down_signals_the_launcher_and_waits_for_the_lock(runtime_dir: Path) -> None:
    lock = RunLock(create_run_dir("mine"))
    received: list[int] = []
    before = {}

    def stop(signum: int, _: object) -> None:
        received.append(signum)
        lock.release()

    for signum in (signal.SIGTERM, signal.SIGQUIT):
        before[signum] = signal.signal(signum, stop)
    try:
        done = pipemax("down", "--name", "mine")
        assert (done.returncode, done.stdout) == (0, "mine stopped\n")
        assert received == [signal.SIGTERM]
        lock = RunLock(runtime_dir / "mine")
        assert pipemax("down", "--name", "mine", "--now").returncode == 0
        assert received == [signal.SIGTERM, signal.SIGQUIT]
    finally:
        lock.release()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_version_and_environment() -> None:
    from importlib.metadata import version

    assert pipemax("version").stdout.strip() == version("pipemax")
    lines = dict(line.split(None, 1) for line in pipemax("collect-env").stdout.splitlines() if line)
    assert lines["torch"] == version("torch")
    assert lines["cores"].endswith(f"of {os.cpu_count()}")


def test_interrupt_is_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipemax.services.collect_env.describe_environment", interrupt)
    monkeypatch.setattr(sys, "argv", ["pipemax", "collect-env"])
    assert main() == 130
    assert "Traceback" not in capsys.readouterr().err


def test_shared_flags_reach_the_command_as_one_object() -> None:
    import typer
    from typer.testing import CliRunner

    seen: list[tuple[EngineOptions, str]] = []

    @takes_engine_options
    def command(engine: EngineOptions, own: str = "x") -> None:
        seen.append((engine, own))

    app = typer.Typer()
    app.command()(command)
    assert (
        CliRunner().invoke(app, ["-pp", "3", "--own", "y", "--max-model-len", "9"]).exit_code == 0
    )
    [(engine, own)] = seen
    assert own == "y"
    assert engine == EngineOptions(pipeline_parallel_size=3, max_model_len=9)
    assert engine.given() == ("--max-model-len", "--pipeline-parallel-size")
    with pytest.raises(TypeError, match="takes EngineOptions"):
        takes_engine_options(json.dumps)
