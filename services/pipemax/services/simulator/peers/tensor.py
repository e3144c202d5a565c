"""Tensor parallelism over all GPUs: one machine n times as large, that also has to add up.

Every layer is split over the n GPUs, and after its attention and after its feed-forward part the
partial sums of all rows are added over all of them: two all-reduces per layer, each

    2·(n − 1)/n · rows·hidden·element / bus + latency

with the bus bandwidth of a ring. Commodity cards have no NVLink and no peer access: what a ring
step sends leaves over the sender's link and enters over the receiver's, through host memory, both
ways at once. The bus is thus a GPU's link in one direction, and at most 1/(2n) of host memory's
bandwidth (each byte is written and read there). That is the best such a machine can do; measured
buses are often slower. The latency is an assumption.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.stage_worker.modelled.roofline import StageModel, StepLoad

ALL_REDUCE_LATENCY_S = 30e-6
"""Of one all-reduce, however small."""


@dataclass(frozen=True)
class TensorParallel:
    """All GPUs of a spec as one."""

    spec: SimulationSpec
    bus_bytes_s: float | None = None
    """None: the best the host links allow."""
    latency_s: float = ALL_REDUCE_LATENCY_S

    def __post_init__(self) -> None:
        heads, size = self.spec.model.num_heads, self.spec.num_gpus
        if heads % size:
            raise ConfigError(
                f"{self.spec.model.name} has {heads} attention heads, which {size} GPUs cannot "
                "share evenly: tensor parallelism does not work here"
            )

    @cached_property
    def whole(self) -> StageModel:
        """The model on one GPU with n times the memory, bandwidth and FLOP/s. With fewer KV heads
        than GPUs, heads are held several times."""
        size, gpu, model = self.spec.num_gpus, self.spec.gpu, self.spec.model
        efficiencies = self.spec.efficiencies
        return StageModel(
            replace(
                gpu,
                memory_bytes=size * gpu.memory_bytes,
                hbm_bytes_s=size * gpu.hbm_bytes_s,
                flop_s=size * gpu.flop_s,
            ),
            replace(model, num_kv_heads=math.lcm(model.num_kv_heads, size))
            if model.num_kv_heads < size
            else model,
            model.num_layers,
            replace(efficiencies, reserved_bytes=size * efficiencies.reserved_bytes),
            self.spec.weight_element_bytes,
            self.spec.kv_element_bytes,
            self.spec.free_prefill,
        )

    @cached_property
    def bus(self) -> float:
        """Bytes per second."""
        if self.bus_bytes_s is not None:
            return self.bus_bytes_s
        spec = self.spec
        link = spec.gpu.link_bytes_s / spec.gpus_per_uplink
        return min(link, spec.timing.host_memory_bytes_s / (2 * spec.num_gpus))

    @cached_property
    def num_blocks(self) -> int:
        """Of KV, all GPUs together."""
        if self.spec.device_blocks is not None:
            return self.spec.device_blocks
        return int(self.whole.kv_bytes // (self.whole.kv_token_bytes * self.spec.block_size))

    def compute_s(self, load: StepLoad) -> float:
        """Of one step, without its all-reduces."""
        return self.whole.step_s(load)

    def all_reduce_s(self, load: StepLoad) -> float:
        """All all-reduces of one step."""
        size = self.spec.num_gpus
        if size == 1:
            return 0.0
        rows = load.decode_rows + (0 if self.spec.free_prefill else load.prefill_rows)
        moved = 2 * (size - 1) / size * self.whole.hop_bytes(rows)
        return 2 * self.spec.model.num_layers * (moved / self.bus + self.latency_s)
