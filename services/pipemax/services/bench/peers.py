"""Other engines as contenders: which program, in which environment, with which settings."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipemax.proto.errors import ConfigError
from pipemax.services.bench.children import Child, children
from pipemax.services.bench.engines import check_lengths
from pipemax.services.bench.processes import cpu_seconds
from pipemax.services.bench.work import Work
from pipemax.services.machine import available_memory_bytes

PEERS = ("transformers", "vllm", "llama.cpp")
_RUNNER = Path(__file__).with_name("peer_runner.py")
_LLAMA = "pipemax.services.bench.peer_llama"
_LOOK_S = 120.0
_OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_PATIENT = {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "86400"}
"""vLLM takes its worker for hung when both were stopped for longer, as they are between rounds."""
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_LIBRARIES = Path("/usr/lib")
_OPENMP = Path("lib", "libiomp5.so")
"""In an environment, where vLLM's requirements put it."""
_DEFAULT_PARALLEL = 32
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_MOST_OF_MEMORY = 0.4
"""Of what is available, for the KV of a peer: both engines are loaded at once."""
_SPARE_KV = 1.25
"""For blocks that are not full at a request's end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFlags:
    """What a user asked for, not yet checked."""

    against: str
    """One of PEERS."""
    place: Path | None = None
    """Virtual environment, or llama-server."""
    model: Path | None = None
    """A GGUF file, for llama.cpp."""
    arguments: tuple[str, ...] = ()
    """KEY=VALUE each."""
    environment: tuple[str, ...] = ()
    """NAME=VALUE each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both sides are to do alike."""

    model: Path
    dtype: str
    load_format: str
    longest_tokens: int
    kv_bytes: int
    """That the KV of all requests of a round takes."""
    enable_prefix_caching: bool
    cores: Sequence[int]


@dataclass(frozen=True, slots=True)
class Peer:
    """Found, checked, not started."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Besides ours."""
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    """What a user should know of it before."""


def find_peer(flags: PeerFlags, setting: Setting) -> Peer:
    """Raises ConfigError saying what is missing, or that a flag does not go with that engine."""
    if flags.against not in PEERS:
        raise ConfigError(f"--against {flags.against} is not one of {', '.join(PEERS)}")
    environment = _OFFLINE | _pairs("--peer-env", flags.environment)
    arguments = _pairs("--peer-arg", flags.arguments)
    if flags.against == "llama.cpp":
        return _llama(flags, setting, environment, arguments)
    if flags.model is not None:
        raise ConfigError(
            f"--peer-model {flags.model} goes with --against llama.cpp; {flags.against} loads the "
            "same folder as PipeMax"
        )
    python = _python_of(flags)
    threads = {"OMP_NUM_THREADS": str(len(setting.cores))}
    notes: tuple[str, ...] = ()
    own: dict[str, Any] = {}
    if flags.against == "vllm":
        threads |= {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, setting.cores)), **_PATIENT}
        libraries = _preloaded(flags)
        if libraries:
            threads["LD_PRELOAD"] = ":".join(map(str, libraries))
        if tcmalloc() is None and "LD_PRELOAD" not in environment:
            notes = (
                "vLLM runs without tcmalloc, which makes its CPU build faster: install "
                "libtcmalloc-minimal4, or give --peer-env LD_PRELOAD=FILE",
            )
        if _KV_SPACE not in environment:
            own["kv_cache_memory_bytes"] = _kv_memory_bytes(setting)
    settings = {
        "model": str(setting.model),
        "dtype": setting.dtype,
        "load_format": setting.load_format,
        "max_model_len": setting.longest_tokens,
        "enable_prefix_caching": setting.enable_prefix_caching,
        "threads": len(setting.cores),
        "arguments": own | {key: _value(text) for key, text in arguments.items()},
    }
    argv = (str(python), "-I", str(_RUNNER), flags.against)
    return Peer(flags.against, argv, threads | environment, settings, notes)


class PeerEngine:
    """A peer that runs; see `engines.Engine`. Between rounds its processes are stopped: vLLM's wait
    for work by spinning, at first, which would slow down whoever has the next round."""

    def __init__(self, peer: Peer, child: Child, version: str, start_up_s: float) -> None:
        self.name = f"{peer.name} {version}"
        self.start_up_s = start_up_s
        self._child = child
        self._peer = peer
        child.pause()

    @property
    def about(self) -> dict[str, Any]:
        return {
            "command": list(self._peer.argv),
            "environment": dict(self._peer.environment),
            "settings": dict(self._peer.settings),
        }

    def run(self, work: Work) -> float:
        asked = [[request.prompt_token_ids, request.output_tokens] for request in work]
        self._child.resume()
        answer = self._child.ask({"requests": asked})
        self._child.pause()
        check_lengths(self.name, answer["output_tokens"], work)
        return float(answer["seconds"])

    def cpu_seconds(self) -> float:
        return cpu_seconds(self._child.session)


@contextlib.contextmanager
def peer_engine(peer: Peer, notice: Callable[[str], None]) -> Iterator[PeerEngine]:
    """Started for the block. Raises PipemaxSystemError with its last exceptions when it fails."""
    for note in peer.notes:
        notice(note)
    notice(f"starting {peer.name}")
    started = time.perf_counter()
    with children(Child(peer.name, peer.argv, peer.environment)) as (child,):
        version = child.ask(peer.settings)["version"]
        yield PeerEngine(peer, child, version, time.perf_counter() - started)


def _llama(
    flags: PeerFlags, setting: Setting, environment: dict[str, str], arguments: dict[str, str]
) -> Peer:
    binary, model = flags.place, flags.model
    if binary is None or not os.access(binary, os.X_OK) or binary.is_dir():
        raise ConfigError(
            f"--against llama.cpp needs --peer FILE, its llama-server; {binary} is none"
            if binary
            else "--against llama.cpp needs --peer FILE, its llama-server"
        )
    if model is None or not model.is_file():
        raise ConfigError(
            "--against llama.cpp needs --peer-model FILE.gguf: the same model, converted by "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    parallel = arguments.pop("parallel", str(_DEFAULT_PARALLEL))
    if not parallel.isdigit() or parallel == "0":
        raise ConfigError(f"--peer-arg parallel={parallel} is not a number of requests")
    threads = str(len(setting.cores))
    given = {
        "model": str(model),
        "parallel": parallel,
        "ctx-size": str(int(parallel) * setting.longest_tokens),
        "threads": threads,
        "threads-batch": threads,
    } | arguments
    words = [word for key, text in given.items() for word in (f"--{key}", text) if word]
    argv = (sys.executable, "-P", "-m", _LLAMA, str(binary), *words)
    return Peer("llama.cpp", argv, environment, {"parallel": int(parallel)})


def _python_of(flags: PeerFlags) -> Path:
    """The interpreter that has the engine; ours where transformers is asked for."""
    module = flags.against
    if flags.place is None:
        if module == "transformers":
            return Path(sys.executable)
        raise ConfigError(
            f"--against {module} needs --peer DIR, the virtual environment that it is installed in"
        )
    python = flags.place / "bin" / "python"
    if not os.access(python, os.X_OK):
        raise ConfigError(f"--peer {flags.place} is no virtual environment: no {python}")
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    looked = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, check=False, timeout=_LOOK_S
    )
    if looked.returncode:
        raise ConfigError(f"--peer {flags.place}: {module} is not installed there")
    return python


def _preloaded(flags: PeerFlags) -> list[Path]:
    """What vLLM says makes it fastest, where it is: tcmalloc, and Intel's OpenMP."""
    openmp = None if flags.place is None else (flags.place / _OPENMP).absolute()
    return [path for path in (tcmalloc(), openmp) if path is not None and path.exists()]


def _kv_memory_bytes(setting: Setting) -> int:
    """For all requests at once, where memory allows. Left to itself, vLLM takes a share of the
    whole machine, and fails when anything else is on it."""
    most = int(available_memory_bytes() * _MOST_OF_MEMORY)
    return min(int(setting.kv_bytes * _SPARE_KV), most)


def tcmalloc() -> Path | None:
    """Where it is installed."""
    for name in _TCMALLOC:
        for found in sorted(_LIBRARIES.glob(f"*/{name}")):
            return found
    return None


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ConfigError(f"{flag} {text}: write it as NAME=VALUE")
        found[key] = value
    return found


def _value(text: str) -> Any:
    """A number, a truth value or what else JSON has; any other text is itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
