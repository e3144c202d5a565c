"""Everything that determines a simulation: the same spec gives the same run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pipemax.coordinator.phases import DEFAULT_PREFILL
from pipemax.coordinator.policy import DEFAULT_POLICY
from pipemax.kv_daemon.core import PIECE_BYTES
from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import blocks_for, split_layers
from pipemax.services.simulator.faults import Fault
from pipemax.services.simulator.measured import MeasuredStage, MeasuredSystem
from pipemax.services.simulator.workload import Workload
from pipemax.stage_worker.modelled.catalogue import Gpu, ModelShape
from pipemax.stage_worker.modelled.roofline import DEFAULT_EFFICIENCIES, Efficiencies, StageModel

HOST_MEMORY_BYTES_S = 400e9
"""An assumption: two sockets of eight DDR4-3200 channels have 410 GB/s on paper, of DDR5-4800
614 GB/s; copies reach less, but read or write each byte only once."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What lies between processes, and what they share. Assumptions, not measurements."""

    message_s: float = 50e-6
    """One message over a local socket."""
    plan_s: float = 300e-6
    """From tokens at the coordinator to the next plan leaving it."""
    hop_s: float = 15e-6
    """Activations to the next stage: latency beside the bytes."""
    copy_s: float = 10e-6
    """From the end of a copy to the daemon knowing it."""
    link_jitter: float = 0.0
    """Standard deviation of a copy's duration, as a share of it."""
    compute_jitter: float = 0.0
    """The same of a step's duration on a stage."""
    load_s: float = 5.0
    """A stage's start and restart beside reading its weights: interpreter, device, warm-up."""
    disk_bytes_s: float = math.inf
    """The disk that holds the weights; stages read one after the other. Infinite: the page cache
    has them."""
    host_memory_bytes_s: float = HOST_MEMORY_BYTES_S
    """Bandwidth of host memory: all copies of all links together."""

    def __post_init__(self) -> None:
        for jitter in (self.link_jitter, self.compute_jitter):
            if not 0 <= jitter <= 0.5:
                raise ConfigError(f"a jitter of {jitter:g} is not between 0 and 0.5")


_DEFAULT_TIMING = Timing()
IDEAL = Timing(
    message_s=0.0,
    plan_s=0.0,
    hop_s=0.0,
    copy_s=0.0,
    load_s=0.0,
    host_memory_bytes_s=math.inf,
)
"""As the closed form has it: only compute and the link take time."""


@dataclass(frozen=True)
class SimulationSpec:
    """One run. Sizes in bytes, times in seconds."""

    gpu: Gpu
    num_gpus: int
    model: ModelShape
    workload: Workload
    efficiencies: Efficiencies = DEFAULT_EFFICIENCIES
    timing: Timing = _DEFAULT_TIMING
    weight_element_bytes: float = 2.0
    kv_element_bytes: float = 2.0
    layer_split: tuple[int, ...] = ()
    """Empty: as even as can be."""
    host_bytes: int = 256 * 10**9
    """Host KV pool for all stages; 0 turns offloading off."""
    block_size: int = 32
    max_num_seqs: int = 1024
    max_num_batched_tokens: int = 2048
    gpus_per_uplink: int = 1
    """GPUs that share one host link."""
    free_prefill: bool = False
    policy: str = DEFAULT_POLICY
    """By name, see `pipemax.coordinator.policy`."""
    prefill: str = DEFAULT_PREFILL
    """`mixed` or `phases`, see `pipemax.coordinator.phases`."""
    seed: int = 0
    horizon_s: float = 1e9
    stop_when_finished: float = 1.0
    """End the run when this share of the requests has finished."""
    warm_up_s: float = 0.0
    """Steady figures count from here on."""
    faults: Sequence[Fault] = field(default_factory=tuple)
    piece_bytes: int = 512 * 2**20
    """Largest copy the daemon starts at once; smaller pieces cost simulation time."""
    device_blocks: int | None = None
    """Instead of what memory would hold."""
    measured: MeasuredSystem | None = None
    """Costs of a live system in place of the roofline and the links' data sheets; see
    `measured_spec`."""
    gantt_s: tuple[float, float] | None = None
    """Record what each stage does in this window of time."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_gpus <= 1024 or self.gpus_per_uplink < 1:
            raise ConfigError(
                f"{self.num_gpus} GPUs, {self.gpus_per_uplink} per uplink: at least 1"
            )
        if self.num_gpus > self.model.num_layers:
            raise ConfigError(
                f"{self.model.name} has {self.model.num_layers} layers, too few for "
                f"{self.num_gpus} GPUs"
            )
        split = self.layers
        if len(split) != self.num_gpus or sum(split) != self.model.num_layers or min(split) < 1:
            raise ConfigError(
                f"the layer split {','.join(map(str, split))} does not put the model's "
                f"{self.model.num_layers} layers on {self.num_gpus} GPUs"
            )
        needed = blocks_for(self.workload.max_model_len, self.block_size) + 1
        if self.num_device_blocks < needed:
            raise ConfigError(
                f"the KV pool of {self.gpu.name} holds {self.num_device_blocks} blocks of "
                f"{self.block_size} tokens, the longest request needs {needed}: use more GPUs"
            )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        return self.layer_split or split_layers(self.model.num_layers, self.num_gpus)

    @cached_property
    def costs(self) -> tuple[StageModel | MeasuredStage, ...]:
        """What each stage's steps take; equal stages share one object."""
        return self.measured.stages if self.measured else self.stages

    @cached_property
    def stages(self) -> tuple[StageModel, ...]:
        """The performance model of each stage; equal stages share one object. Not of a measured
        system."""
        models = {
            layers: StageModel(
                self.gpu,
                self.model,
                layers,
                self.efficiencies,
                self.weight_element_bytes,
                self.kv_element_bytes,
                self.free_prefill,
            )
            for layers in set(self.layers)
        }
        return tuple(models[layers] for layers in self.layers)

    @property
    def full_link_bytes_s(self) -> float:
        """What one GPU's link carries in one direction while every GPU uses its own."""
        link = self.gpu.link_bytes_s / self.gpus_per_uplink
        return min(link, self.timing.host_memory_bytes_s / self.num_gpus)

    def hop_s(self, rows: int) -> float:
        """Activations of `rows` tokens to the next stage when nothing else is on the links. Cards
        without peer access go through host memory: out over the sender's link, then in over the
        receiver's."""
        if self.free_prefill:
            return self.timing.hop_s
        return self.timing.hop_s + 2 * self.stages[0].hop_bytes(rows) / self.gpu.link_bytes_s

    @cached_property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block on each stage."""
        if self.measured:
            return tuple(stage.block_bytes for stage in self.measured.stages)
        return tuple(round(stage.kv_token_bytes * self.block_size) for stage in self.stages)

    @cached_property
    def num_device_blocks(self) -> int:
        """Of the stage that has the fewest."""
        if self.device_blocks is not None:
            return self.device_blocks
        return min(
            int(stage.kv_bytes // size)
            for stage, size in zip(self.stages, self.block_bytes, strict=True)
        )

    @cached_property
    def num_host_blocks(self) -> int:
        return self.host_bytes // sum(self.block_bytes)

    @property
    def link_rates(self) -> tuple[tuple[float, float], ...]:
        """By stage: bytes per second to the device and to the host."""
        if self.measured is None:
            return ((self.gpu.link_bytes_s, self.gpu.link_bytes_s),) * self.num_gpus
        return tuple(
            (stage.load_bytes_s or math.inf, stage.store_bytes_s or math.inf)
            for stage in self.measured.stages
        )

    @property
    def link_groups(self) -> tuple[int, ...]:
        """By stage: which uplink it uses."""
        if self.measured:
            return self.measured.group_of
        return tuple(stage // self.gpus_per_uplink for stage in range(self.num_gpus))

    @property
    def duplex_links(self) -> bool:
        """Loads and stores of a link do not wait for each other."""
        return self.measured is None or self.measured.duplex


def measured_spec(measured: MeasuredSystem, workload: Workload) -> SimulationSpec:
    """What was measured on a live system, with this workload; `replace` the rest.

    It has no GPU and no model shape to compute with: both are there by name only, their figures not
    a number, so that whoever uses one gets no answer rather than a wrong one.
    """
    nan = math.nan
    layers = tuple(stage.num_layers for stage in measured.stages)
    return SimulationSpec(
        gpu=Gpu("measured stages", nan, nan, nan, nan),
        num_gpus=len(measured.stages),
        model=ModelShape(measured.model, sum(layers), 0, 0, 0, 0, nan, nan),
        workload=workload,
        timing=Timing(
            message_s=measured.message_s,
            plan_s=measured.plan_s,
            hop_s=measured.hop_s,
            copy_s=measured.copy_s,
            host_memory_bytes_s=math.inf,
        ),
        layer_split=layers,
        host_bytes=measured.num_host_blocks * sum(s.block_bytes for s in measured.stages),
        block_size=measured.block_size,
        device_blocks=measured.num_device_blocks,
        piece_bytes=PIECE_BYTES,
        measured=measured,
    )
