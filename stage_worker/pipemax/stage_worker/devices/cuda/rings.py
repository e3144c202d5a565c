"""How rows travel between a stage on a GPU and its neighbours."""

from typing import Literal, cast

from pipemax.proto.config import EngineConfig
from pipemax.proto.cuda.runtime import Stream
from pipemax.proto.errors import ConfigError, InvariantError
from pipemax.stage_worker.channels.ring import RingShape, RowReader, Rows, RowWriter, Transport
from pipemax.stage_worker.devices.cuda.buffers import Gpu, Leftovers
from pipemax.stage_worker.devices.cuda.inlet import FrameRing, Inlet, RingReader
from pipemax.stage_worker.devices.cuda.outlet import (
    DeviceOutlet,
    FrameOutlet,
    HostOutlet,
    Outlet,
    QueuedRows,
)


class CudaRings:
    """RingMemory of a stage: makes its channel ends, and is their side towards the kernels.

    Ends are made for the whole life of the stage; memory that peers mapped, or that kernels use,
    stays until `close`.
    """

    def __init__(
        self,
        gpu: Gpu,
        config: EngineConfig,
        stage: int,
        shape: RingShape,
        compute: Stream,
    ) -> None:
        assert config.cuda is not None
        self._gpu = gpu
        self._runtime = gpu.runtime
        self._gpus = config.cuda.gpus
        self._shape = shape
        self._leftovers = Leftovers()
        self._same_gpu_as_previous = stage > 0 and self._gpus[stage - 1] == gpu.runtime.gpu
        is_last = stage == len(self._gpus) - 1
        self.inlet = Inlet(gpu, shape) if stage > 0 else None
        self.outlet: Outlet | None = None
        """None on the last stage."""
        if not is_last:
            wanted = config.activation_transport
            self.outlet = self._make_outlet(self.transport(wanted, stage), stage, compute)

    def _make_outlet(self, transport: Transport, stage: int, compute: Stream) -> Outlet:
        """GPUs that do not reach each other's memory are not known to reach each other's events:
        CUDA may refuse to open them (cuIpcOpenEventHandle, CUDA_ERROR_PEER_ACCESS_UNSUPPORTED)."""
        if transport == "ipc":
            return DeviceOutlet(self._gpu, self._shape, compute)
        if transport == "tcp":
            return FrameOutlet(self._gpu, self._shape)
        peers = self._runtime.can_access_peer(self._gpus[stage + 1])
        return HostOutlet(self._gpu, self._shape, shares_events=peers)

    def transport(self, wanted: Literal["auto"] | Transport, sender: int) -> Transport:
        """`ipc` needs GPUs that read each other's memory. CUDA answers both ends alike."""
        if wanted in ("shm", "tcp"):
            return cast(Transport, wanted)
        here, there = self._gpus[sender], self._gpus[sender + 1]
        other = there if here == self._runtime.gpu else here
        if self._runtime.can_access_peer(other):
            return "ipc"
        if wanted == "ipc":
            raise ConfigError(
                f"--activation-transport ipc: GPU {here} of stage {sender} and GPU {there} of "
                f"stage {sender + 1} do not read each other's memory; use auto or shm"
            )
        return "shm"

    def row_writer(self, transport: Transport, shape: RingShape) -> RowWriter:
        if not isinstance(self.outlet, DeviceOutlet | HostOutlet) or shape != self._shape:
            raise InvariantError(f"rows of {shape} by {transport} were not prepared for")
        return self.outlet

    def row_reader(self, transport: Transport, shape: RingShape) -> RowReader:
        own = self._runtime.properties().pci_bus_id
        return RingReader(
            self._runtime,
            transport,
            shape,
            self._leftovers,
            own if self._same_gpu_as_previous else None,
        )

    def allocate_ring(self, shape: RingShape) -> FrameRing:
        return FrameRing(self._runtime, shape, self._leftovers)

    def frame(self, rows: Rows) -> memoryview:
        frame = cast(QueuedRows, rows).frame
        assert frame is not None, "rows that do not travel in frames"
        return frame

    def collect(self) -> None:
        """Closes what is left of neighbours' former lives. The GPU has nothing queued."""
        self._leftovers.close()

    def close(self) -> None:
        """The GPU has nothing queued, and the channels are closed."""
        self.collect()
        for end in (self.inlet, self.outlet):
            if end is not None:
                end.free()
