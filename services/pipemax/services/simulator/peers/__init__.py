"""Models of peers: how other systems' scheduling would do on the same modelled GPUs.

Each is a model, never a measurement: our reading of what was published, as one short loop over the
same stage model, workload, memory arithmetic and message times as the simulation of PipeMax. None
uses the shipped cores, none is the peer's code. Every module says what it models, what it leaves
out and in whose favour that is.

| name | module | what it stands for |
|---|---|---|
| `vllm-pp` | `vllm_pp` | pipeline parallelism with virtual engines, no offloading |
| `vllm-tp` | `vllm_tp` | tensor parallelism over the host links, no offloading |
| `td-pipe` | `td_pipe` | long prefill and decode phases on a pipeline, no offloading |
| `seesaw` | `seesaw` | prefill as a pipeline, decode tensor-parallel, KV buffered on the host |
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.peers import seesaw, td_pipe, vllm_pp, vllm_tp
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

_ON_PIPELINES: Mapping[str, tuple[str, Callable[[SimulationSpec], Result]]] = {
    "vllm-pp": (vllm_pp.NAME, vllm_pp.simulate_vllm_pp),
    "td-pipe": (td_pipe.NAME, td_pipe.simulate_td_pipe),
}
_WITH_ALL_REDUCES: Mapping[str, tuple[str, Callable[[SimulationSpec, float | None], Result]]] = {
    "vllm-tp": (vllm_tp.NAME, vllm_tp.simulate_vllm_tp),
    "seesaw": (seesaw.NAME, seesaw.simulate_seesaw),
}
PEERS = ("vllm-pp", "vllm-tp", "td-pipe", "seesaw")


def parse_peers(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Names from lists such as `vllm-pp,td-pipe`, each once. Raises ConfigError."""
    names = [name.strip() for text in texts for name in text.split(",")]
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--against {name!r} is not one of {', '.join(PEERS)}")
    return tuple(dict.fromkeys(names))


def simulate_peer(
    name: str, spec: SimulationSpec, bus_bytes_s: float | None = None
) -> tuple[str, SimulationSpec, Result]:
    """Heading, what was simulated (only Seesaw uses host memory) and what came out. `bus_bytes_s`:
    bandwidth of all-reduces, None for the best that the host links allow. Raises ConfigError for
    what the model of this peer cannot do."""
    if spec.measured:
        raise ConfigError("models of peers need a GPU's data sheet: leave out --measured")
    if spec.faults or spec.timing.link_jitter or spec.timing.compute_jitter:
        raise ConfigError(
            "models of peers know neither faults nor jitter: leave out --fault, --link-jitter and "
            "--compute-jitter, or --against"
        )
    own = spec if name == "seesaw" else replace(spec, host_bytes=0)
    if name in _ON_PIPELINES:
        heading, run = _ON_PIPELINES[name]
        return heading, own, run(own)
    heading, run_with_bus = _WITH_ALL_REDUCES[name]
    return heading, own, run_with_bus(own, bus_bytes_s)
