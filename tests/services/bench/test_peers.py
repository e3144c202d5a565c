"""Other engines: what is refused, how they are started, what they answer. The engines are fakes;
the program that runs them is not."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipemax.proto.errors import ConfigError, PipemaxSystemError
from pipemax.services.bench import peers
from pipemax.services.bench.command import run_throughput
from pipemax.services.bench.peers import Peer, PeerFlags, Setting, find_peer, peer_engine
from pipemax.services.bench.work import BenchRequest
from pipemax.services.cli.bench_flags import ThroughputFlags
from pipemax.services.tiny_model import ModelShape, make_demo_model

WORK = (BenchRequest([5, 6, 7], 4), BenchRequest([8], 2))
SETTING = Setting(
    model=Path("/models/m"),
    dtype="bfloat16",
    load_format="auto",
    longest_tokens=77,
    kv_bytes=4000,
    enable_prefix_caching=False,
    cores=(0, 3),
)
VLLM = """
import json, os
__version__ = "0.32.0"
print("a library prints what it likes")

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature == 0.0 and ignore_eos
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, **arguments):
        names = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "HF_HUB_OFFLINE", "EXTRA")
        names += ("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",)
        seen = {name: os.environ.get(name) for name in names}
        with open(os.environ["RECORD"], "w") as file:
            json.dump({"arguments": arguments, "environment": seen}, file)
        self.short = arguments.get("short", 0)

    def generate(self, prompts, sampling, use_tqdm):
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [Output(one.max_tokens - self.short) for one in sampling]

class Output:
    def __init__(self, count):
        self.outputs = [self]
        self.token_ids = [1] * count
"""


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with an engine that is called vllm."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "vllm.py").write_text(VLLM)
    return executable(
        tmp_path / "venv" / "bin" / "python",
        "#!/bin/sh\n[ $1 = -I ] || exit 9\nshift\n"  # which would hide the modules
        f'PYTHONPATH={modules} exec {sys.executable} "$@"\n',
    ).parent.parent


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def flags(against: str, **given: Any) -> PeerFlags:
    return PeerFlags(against=against, **given)


def test_vllm_runs_from_the_environment_given(environment: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    asked = flags(
        "vllm",
        place=environment,
        arguments=("max_num_seqs=256", "quantization=fp8", "enforce_eager=true"),
        environment=(f"RECORD={record}", "EXTRA=yes", "LD_PRELOAD="),
    )
    with peer_engine(find_peer(asked, SETTING), lambda line: None) as engine:
        assert engine.name == "vllm 0.32.0"
        assert engine.start_up_s > 0
        assert 0 < engine.run(WORK) < 60
        assert engine.run(WORK[:1]) > 0
    found = json.loads(record.read_text())
    assert found["arguments"] == {
        "model": "/models/m",
        "dtype": "bfloat16",
        "load_format": "auto",
        "max_model_len": 77,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 5000,
        "max_num_seqs": 256,
        "quantization": "fp8",
        "enforce_eager": True,
    }
    assert found["environment"] == {
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0,3",
        "HF_HUB_OFFLINE": "1",
        "EXTRA": "yes",
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400",
    }
    assert engine.about["settings"]["arguments"]["max_num_seqs"] == 256
    assert engine.about["environment"]["EXTRA"] == "yes"


def test_an_engine_that_stops_early_is_no_measurement(environment: Path, tmp_path: Path) -> None:
    asked = flags(
        "vllm",
        place=environment,
        arguments=("short=1",),
        environment=(f"RECORD={tmp_path / 'r'}", "LD_PRELOAD="),
    )
    with (
        peer_engine(find_peer(asked, SETTING), lambda line: None) as engine,
        pytest.raises(PipemaxSystemError, match=r"vllm 0\.32\.0: request 0 has 3 output tokens"),
    ):
        engine.run(WORK)


def test_an_engine_that_fails_says_why(environment: Path) -> None:
    asked = flags("vllm", place=environment, environment=("RECORD=/no/such/file", "LD_PRELOAD="))
    with (
        pytest.raises(PipemaxSystemError, match=r"vllm: FileNotFoundError.*/no/such/file"),
        peer_engine(find_peer(asked, SETTING), lambda line: None),
    ):
        pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"environment": ("VLLM_CPU_KVCACHE_SPACE=4",)}, {}),
        ({"arguments": ("kv_cache_memory_bytes=7",)}, {"kv_cache_memory_bytes": 7}),
        ({}, {"kv_cache_memory_bytes": 400}),
    ],
)
def test_vllm_gets_room_for_the_requests_where_memory_allows(
    environment: Path, monkeypatch: pytest.MonkeyPatch, given: Any, expected: dict[str, int]
) -> None:
    monkeypatch.setattr(peers, "available_memory_bytes", lambda: 1000)
    found = find_peer(flags("vllm", place=environment, **given), SETTING)
    assert found.settings["arguments"] == expected


FAILING = """
import sys
sys.stdin.readline()
sys.exit('''(EngineCore pid=7) ERROR 11-21 [core.py:9] ValueError: not enough memory
(EngineCore pid=7) ValueError: not enough memory
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
a hint in the end''')
"""


def test_of_several_processes_that_fail_the_first_is_named_and_the_log_kept() -> None:
    peer = Peer("vllm", (sys.executable, "-c", FAILING), {}, {})
    with (
        pytest.raises(PipemaxSystemError, match="vllm: ") as failed,
        peer_engine(peer, lambda line: None),
    ):
        pass
    said, _, log = str(failed.value).removesuffix(")").partition(" (its log: ")
    assert said == (
        "vllm: ValueError: not enough memory; RuntimeError: Engine core initialization failed. "
        "See root cause above."
    )
    kept = Path(log)
    assert "a hint in the end" in kept.read_text()
    kept.unlink()


SPINNING = """
import json, multiprocessing, sys

def spin():
    while True:
        pass

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    sys.stdin.readline()
    process = multiprocessing.Process(target=spin, daemon=True)
    process.start()
    print(json.dumps({"version": "1"}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": 1.0, "output_tokens": [4, 2]}), flush=True)
"""


def test_a_peer_is_stopped_between_rounds(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(SPINNING)
    with peer_engine(Peer("x", (sys.executable, str(script)), {}, {}), lambda line: None) as engine:
        assert engine.run(WORK) == 1.0
        used = engine.cpu_seconds()
        time.sleep(0.2)  # in which a process that spins would have used some
        assert engine.cpu_seconds() == used
        assert engine.run(WORK) == 1.0


def test_tcmalloc_is_preloaded_where_it_is(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_LIBRARIES", tmp_path)
    without = find_peer(flags("vllm", place=environment), SETTING)
    assert "LD_PRELOAD" not in without.environment
    assert "libtcmalloc-minimal4" in without.notes[0]
    library = tmp_path / "x86" / "libtcmalloc_minimal.so.4"
    library.parent.mkdir()
    library.touch()
    found = find_peer(flags("vllm", place=environment), SETTING)
    assert (found.environment["LD_PRELOAD"], found.notes) == (str(library), ())
    openmp = environment / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    both = find_peer(flags("vllm", place=environment), SETTING)
    assert both.environment["LD_PRELOAD"] == f"{library}:{openmp}"
    own = find_peer(flags("vllm", place=environment, environment=("LD_PRELOAD=x",)), SETTING)
    assert own.environment["LD_PRELOAD"] == "x"


def test_transformers_runs_from_our_own_environment_unless_told(environment: Path) -> None:
    found = find_peer(flags("transformers", arguments=("mode=padded",)), SETTING)
    assert found.argv[:2] == (sys.executable, "-I")
    assert found.settings["arguments"] == {"mode": "padded"}
    assert found.environment["OMP_NUM_THREADS"] == "2"
    executable(environment / "bin" / "python", "#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match="transformers is not installed there"):
        find_peer(flags("transformers", place=environment), SETTING)


LLAMA = """#!{python}
import http.server, json, sys
if "--version" in sys.argv:
    sys.exit("version: 6000 (abcdef)\\nbuilt with cc")
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--ctx-size"] == "308" and flags["--parallel"] == "4", flags
assert flags["--threads"] == "2" and flags["--model"].endswith(".gguf")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({{"status": "ok"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["ignore_eos"] and body["cache_prompt"] is False, body
        assert all(isinstance(one, int) for one in body["prompt"])
        self.answer({{"tokens_predicted": body["n_predict"]}})

    def answer(self, body):
        text = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass

address = (flags["--host"], int(flags["--port"]))
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""


def test_llama_cpp_is_spoken_to_as_a_server(tmp_path: Path) -> None:
    binary = executable(tmp_path / "llama-server", LLAMA.format(python=sys.executable))
    model = tmp_path / "m.gguf"
    model.touch()
    asked = flags("llama.cpp", place=binary, model=model, arguments=("parallel=4",))
    with peer_engine(find_peer(asked, SETTING), lambda line: None) as engine:
        assert engine.name == "llama.cpp 6000 (abcdef)"
        assert engine.run(WORK) > 0


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (flags("sglang"), "--against sglang is not one of transformers, vllm, llama.cpp"),
        (flags("vllm"), "needs --peer DIR"),
        (flags("vllm", place=Path("/no/such")), "/no/such is no virtual environment"),
        (flags("vllm", model=Path("m.gguf")), "goes with --against llama.cpp"),
        (flags("llama.cpp"), "needs --peer FILE, its llama-server"),
        (flags("llama.cpp", place=Path("/usr")), "/usr is none"),
        (flags("llama.cpp", place=Path(sys.executable)), "needs --peer-model FILE.gguf"),
        (flags("transformers", arguments=("mode",)), "--peer-arg mode: write it as NAME=VALUE"),
        (flags("transformers", environment=("=1",)), "--peer-env =1: write it as NAME=VALUE"),
    ],
)
def test_what_cannot_run_is_refused_by_name(asked: PeerFlags, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        find_peer(asked, SETTING)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"peer_arg": ["a=1"]}, "--peer-arg goes with --against"),
        ({"against": "sglang"}, "--against sglang is not one of"),
        ({"against": "transformers", "device": "cuda"}, "measure on the CPU"),
    ],
)
def test_flags_are_refused_before_anything_starts(
    given: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = make_demo_model(tmp_path, shape=ModelShape(num_layers=1))
    with pytest.raises(ConfigError, match=reason):
        run_throughput(ThroughputFlags(model=str(model), **given), as_json=False, output_json=None)
