"""The stage that computes on a GPU."""

import contextlib
import logging
import os
import time
from functools import partial
from pathlib import Path
from typing import Final

import torch

from pipemax.proto import cuda
from pipemax.proto.config import CudaDevice, EngineConfig
from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.errors import PipemaxError
from pipemax.proto.geometry import blocks_for
from pipemax.proto.messages.control import SweepSample
from pipemax.stage_worker.attention.device.layout import BatchLayout
from pipemax.stage_worker.attention.device.select import open_attention
from pipemax.stage_worker.channels.ring import RingMemory
from pipemax.stage_worker.devices.cuda import torch_side
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu
from pipemax.stage_worker.devices.cuda.copies import CudaKvEnd, DevicePool, open_kv_end
from pipemax.stage_worker.devices.cuda.forward import ForwardPass
from pipemax.stage_worker.devices.cuda.graphs import DecodeGraphs
from pipemax.stage_worker.devices.cuda.host_region import HostRegions
from pipemax.stage_worker.devices.cuda.inputs import InputVersion, InputVersions, inputs_bytes
from pipemax.stage_worker.devices.cuda.memory import blocks_left
from pipemax.stage_worker.devices.cuda.outlet import Outlet
from pipemax.stage_worker.devices.cuda.rings import CudaRings
from pipemax.stage_worker.devices.cuda.start import StartUp, capture_all
from pipemax.stage_worker.devices.cuda.step import CudaSteps, StepStreams
from pipemax.stage_worker.devices.cuda.sweep_work import SweepWork
from pipemax.stage_worker.devices.cuda.token_exit import TokenExit
from pipemax.stage_worker.devices.cuda.work_loop import (
    INPUT_VERSIONS,
    MAX_IN_FLIGHT,
    CudaWorkLoop,
)
from pipemax.stage_worker.engine import WorkLoop, pool_blocks
from pipemax.stage_worker.executor import Links
from pipemax.stage_worker.model.load import load_stage_model
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.model_engine import ModelEngine
from pipemax.stage_worker.state_clock import StateClock
from pipemax.stage_worker.step_queue import StepQueue
from pipemax.stage_worker.sweep import SweepLimits, sweep

_LET_GO_S: Final = 30.0
"""Longest wait for a daemon that maps the pool of this stage's predecessor, whose memory is free
only then."""
_DRAIN_S: Final = 5.0
"""Longest wait, at the end, for steps in flight."""
_NOWHERE: Final = Path(os.devnull)
"""No daemon has its socket there."""

log = logging.getLogger(__name__)


class CudaEngine(ModelEngine):
    """StageEngine for stage `stage`. Loads weights, records graphs, allocates the KV pool."""

    _kv: CudaKvEnd

    def __init__(self, config: EngineConfig, stage: int, run_dir: Path | None) -> None:
        assert config.cuda is not None
        self._config = config
        self._cuda: CudaDevice = config.cuda
        self._stage = stage
        self._opened = contextlib.ExitStack()
        self._busy: list[Stream] = []
        """Streams that have to be empty before anything is given back."""
        self._graphs: DecodeGraphs | None = None
        torch.set_num_threads(config.threads_per_stage)
        try:
            self._open(run_dir)
        except BaseException:
            self.close()
            raise

    def _open(self, run_dir: Path | None) -> None:
        self._runtime = cuda.open_runtime(self._cuda.gpus[self._stage])
        self._gpu = Gpu(self._runtime, torch_side.open_torch(self._runtime))
        self._streams = StepStreams(self._runtime)
        self._opened.callback(self._streams.close)
        self._compute = self._streams.compute
        self._busy += [self._streams.upload, self._compute]
        self._regions = HostRegions(self._runtime, run_dir or _NOWHERE, self._stage)
        self._opened.callback(self._regions.close)
        self._model = self._load_model()
        self._open_buffers()
        if run_dir is not None and self._cuda.kv_copies == "daemon":
            self._regions.wait_answered(_LET_GO_S)
        self._open_pool()
        self._steps = CudaSteps(
            self._runtime,
            self._model,
            ForwardPass(self._gpu.torch, self._model, self._graphs),
            self._versions,
            self._streams,
            self._kv,
            num_blocks=self.num_blocks,
            inlet=self._rings.inlet,
            way_out=self._way_out,
        )

    def _load_model(self) -> StageModel:
        device = self._gpu.torch.device
        with self._gpu.torch.scope(self._compute):
            model = load_stage_model(
                Path(self._config.model),
                stage=self._stage,
                layer_split=self._config.layer_split,
                dtype=self._config.dtype,
                block_size=self._config.block_size,
                device=device,
                open_attention=partial(
                    open_attention, name=self._cuda.attention_backend, device=device
                ),
                load_format=self._config.load_format,
            )
        self._runtime.synchronize(self._compute)
        return model

    def _open_buffers(self) -> None:
        """All that has one address for life, but the KV pool."""
        config, gpu, model = self._config, self._gpu, self._model
        self._rings = CudaRings(gpu, config, self._stage, self.ring_shape, self._compute)
        self._opened.callback(self._rings.close)
        seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        table_blocks = seqs * blocks_for(config.max_model_len, config.block_size)
        tokens = config.max_num_batched_tokens
        largest = BatchLayout(
            rows=tokens,
            items=seqs,
            decodes=seqs,
            tiles=tokens,
            samples=seqs,
            table_blocks=table_blocks,
        )
        self._versions = InputVersions(
            [InputVersion(gpu, inputs_bytes(largest)) for _ in range(INPUT_VERSIONS)]
        )
        self._opened.callback(self._versions.close)
        self._token_exit: TokenExit | None = None
        if model.is_last:
            self._token_exit = TokenExit(
                gpu,
                max_rows=seqs,
                vocab_size=model.vocab_size,
                steps=MAX_IN_FLIGHT,
                tokenizer=Path(config.model) / "tokenizer.json",
                num_samplers=config.sampler_workers,
                ring=self._logits_shape,
            )
            self.logits_place = self._token_exit.place
            self._opened.callback(self._token_exit.free)
        self._busy.append(self._way_out.stream)
        self._opened.callback(self._drop_graphs)
        if not self._cuda.enforce_eager:
            self._graphs = DecodeGraphs(gpu, model, max_rows=seqs, table_blocks=table_blocks)

    @property
    def _way_out(self) -> Outlet | TokenExit:
        way_out = self._token_exit or self._rings.outlet
        assert way_out is not None
        return way_out

    def _open_pool(self) -> None:
        """After the memory of everything else is known."""
        config, geometry = self._config, self._model.geometry
        start = StartUp(self._gpu, config, self._model, self._compute)
        if self._graphs is not None and not start.usable(self._graphs):
            self._drop_graphs()
        if config.kv_cache_memory_bytes is not None:
            self.num_blocks = pool_blocks(
                geometry.block_bytes, geometry.block_size, config.kv_cache_memory_bytes, self._stage
            )
        else:
            use = start.measure(self._graphs)
            request_blocks = blocks_for(config.max_model_len, config.block_size)
            self.num_blocks = blocks_left(use, geometry.block_bytes, request_blocks, self._stage)
            log.info("KV pool: %s", use)
        self._pool = DeviceBuffer(self._gpu, self.num_blocks * geometry.block_bytes)
        self._opened.callback(self._pool.close)
        self._runtime.fill_zero(self._pool.pointer, self._pool.size_bytes, self._compute)
        shape = (self.num_blocks, *geometry.block_shape)
        self._model.bind_pool(self._pool.tensor(shape, self._model.dtype))
        with self._gpu.torch.scope(self._compute):
            self._model.warm_up()
        self._runtime.synchronize(self._compute)
        if self._graphs is not None:
            capture_all(self._graphs, self._gpu, self._compute)
        pool = DevicePool(self._pool.pointer, self.num_blocks, geometry.block_bytes)
        self._kv = open_kv_end(config, self._runtime, pool, self._regions)
        self._opened.callback(self._kv.close)

    def _drop_graphs(self) -> None:
        if self._graphs is not None:
            self._runtime.synchronize(self._compute)
            self._graphs.free()
            self._graphs = None

    @property
    def ring_memory(self) -> RingMemory:
        return self._rings

    def sweep(self, limit_s: float) -> tuple[SweepSample, ...]:
        """Takes `limit_s`."""
        if limit_s <= 0:
            return ()
        work = SweepWork(self._gpu, self._steps, self._streams, self.ring_shape)
        limits = SweepLimits.of(self._config, self.num_blocks)
        first = self._model.is_first
        samples = sweep(
            work,
            limits,
            self._model.vocab_size,
            lambda count: None if first else work.rows(count),
            limit_s,
            time.perf_counter,
        )
        work.close()
        return samples

    def work_loop(self, queue: StepQueue, links: Links, clock: StateClock) -> WorkLoop:
        return CudaWorkLoop(self._runtime, queue, self._steps, links, clock, self._rings)

    def close(self) -> None:
        """Gives everything back once the GPU has nothing queued. Where that waits for a process
        that is gone, or the GPU fails, all is left to the end of this one: why it ends is said
        elsewhere."""
        try:
            if self._drained():
                self._opened.close()
            else:
                log.warning("steps in flight do not end; they wait for a process that is gone")
        except PipemaxError as error:
            log.warning("not everything was given back: %s", error)

    def _drained(self) -> bool:
        """Everything queued has run, within a few seconds."""
        give_up_s = time.monotonic() + _DRAIN_S
        events = []
        for stream in self._busy:
            event = self._runtime.create_event()
            self._runtime.record(event, stream)
            events.append(event)
        while not all(map(self._runtime.finished, events)):
            if time.monotonic() > give_up_s:
                return False
            time.sleep(0.002)
        for event in events:
            self._runtime.destroy_event(event)
        return True
