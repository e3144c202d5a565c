"""A step on the GPU: everything it takes, queued on streams without waiting for any of it."""

from dataclasses import dataclass

import torch

from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream
from pipemax.proto.errors import WireError
from pipemax.proto.messages.control import StepPlan
from pipemax.proto.states import State
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.channels.ring import Rows
from pipemax.stage_worker.devices.cuda.copies import CudaKvEnd
from pipemax.stage_worker.devices.cuda.forward import ForwardPass
from pipemax.stage_worker.devices.cuda.inlet import Inlet
from pipemax.stage_worker.devices.cuda.inputs import InputVersion, InputVersions, StepInputs
from pipemax.stage_worker.devices.cuda.outlet import Outlet, QueuedRows
from pipemax.stage_worker.devices.cuda.token_exit import PendingTokens, TokenExit
from pipemax.stage_worker.model.stage_model import StageModel
from pipemax.stage_worker.plan_columns import read_columns
from pipemax.stage_worker.sampling import Sampled


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step whose inputs are on their way to the GPU."""

    plan: StepPlan
    version: InputVersion
    inputs: StepInputs


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that is queued on the GPU. Exactly one of `rows` and `tokens` is given, the latter
    only where the plan samples."""

    plan: StepPlan
    version: InputVersion
    computed: int
    """Number of its `computed` event."""
    rows: QueuedRows | None = None
    tokens: PendingTokens | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """Where the device's time went, since the step before or since its turn came, in order."""

    states: tuple[tuple[State, float], ...]
    compute_s: float


class StepStreams:
    """`compute` has the kernels of all steps, `upload` their inputs."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.compute: Stream = runtime.create_stream()
        self.upload: Stream = runtime.create_stream(urgent=True)

    def close(self) -> None:
        for stream in (self.compute, self.upload):
            self._runtime.destroy_stream(stream)


class CudaSteps:
    """Prepares, launches and lands steps of one stage."""

    def __init__(
        self,
        runtime: CudaRuntime,
        model: StageModel,
        forward: ForwardPass,
        versions: InputVersions,
        streams: StepStreams,
        kv: CudaKvEnd,
        *,
        num_blocks: int,
        inlet: Inlet | None,
        way_out: Outlet | TokenExit,
    ) -> None:
        """`inlet`: None on the first stage. `way_out`: of tokens on the last stage, else of
        rows."""
        self._runtime = runtime
        self._model = model
        self._forward = forward
        self._versions = versions
        self._streams = streams
        self._kv = kv
        self._num_blocks = num_blocks
        self._inlet = inlet
        self._outlet = None if isinstance(way_out, TokenExit) else way_out
        self._token_exit = way_out if isinstance(way_out, TokenExit) else None

    @property
    def announces_rows_ahead(self) -> bool:
        return self._outlet is not None and self._outlet.announces_ahead

    def prepare(self, plan: StepPlan) -> Prepared | None:
        """Packs the plan's inputs and queues their copy; None while no version of the buffers is
        free. Raises WireError when the plan contradicts itself or this stage."""
        version = self._versions.take()
        if version is None:
            return None
        columns = read_columns(plan, self._model.geometry.block_size)
        if columns.max_block >= self._num_blocks:
            raise WireError(
                "bad_plan",
                f"step {plan.step} uses block {columns.max_block}; this pool has "
                f"{self._num_blocks}",
            )
        batch = self._forward.batch(self._forward.layout(columns), version)
        inputs = version.pack(
            DeviceStep(batch, columns),
            self._forward.attention.tile_tokens,
            plan.sample if self._model.is_last else (),
            self._model.vocab_size,
            self._streams.upload,
            0 if self._token_exit is None else self._token_exit.num_samplers,
        )
        self._model.check_tokens(inputs.step)
        return Prepared(plan, version, inputs)

    def forget(self, prepared: Prepared) -> None:
        """It will not be launched."""
        self._versions.give_back(prepared.version)

    def ready(self, prepared: Prepared) -> bool:
        """There is a place for what it makes."""
        sample = prepared.inputs.sample
        return self._token_exit is None or sample is None or self._token_exit.ready(sample)

    def launch(self, prepared: Prepared, rows: Rows | None, last_load: int) -> Flight:
        """Queues the step behind all that was launched. `rows` and load number `last_load` were
        announced; where they are not there yet, the GPU waits for them."""
        plan, version = prepared.plan, prepared.version
        runtime, compute, marks = self._runtime, self._streams.compute, version.marks
        runtime.record(marks.begin, compute)
        runtime.wait(compute, version.uploaded)
        target = None if self._outlet is None else self._outlet.open(plan.slot, compute)
        runtime.record(marks.inputs, compute)
        hidden = None
        if rows is not None:
            assert self._inlet is not None
            hidden = self._inlet.take(rows, compute)
        runtime.record(marks.rows, compute)
        self._kv.wait_loaded(compute, last_load)
        runtime.record(marks.loaded, compute)
        flight = self._compute(prepared, hidden, target)
        runtime.wait(self._exit_stream, marks.computed)
        runtime.record(version.ended, self._exit_stream)
        return flight

    def _compute(
        self, prepared: Prepared, hidden: torch.Tensor | None, target: torch.Tensor | None
    ) -> Flight:
        """From the kernels on."""
        plan, version, inputs = prepared.plan, prepared.version, prepared.inputs
        compute = self._streams.compute
        made: list[torch.Tensor] = []
        num_rows = inputs.step.columns.token_ids.shape[0]

        def deliver(out: torch.Tensor) -> None:
            if target is None:
                made.append(out)
                return
            with torch.inference_mode():
                target[:num_rows].copy_(out[:num_rows])

        self._forward.queue(inputs, version, hidden, compute, deliver)
        if hidden is not None:
            assert self._inlet is not None
            self._inlet.release(compute)
        tokens = None
        if self._token_exit is not None and inputs.sample is not None:
            tokens = self._token_exit.take(
                inputs.sample, len(plan.sample), made.pop, compute, plan.slot
            )
        self._runtime.record(version.marks.computed, compute)
        computed = self._kv.record_computed(compute)
        if self._outlet is None:
            return Flight(plan, version, computed, tokens=tokens)
        rows = self._outlet.shut(plan.slot, num_rows, compute)
        return Flight(plan, version, computed, rows=rows)

    @property
    def _exit_stream(self) -> Stream:
        way_out = self._outlet or self._token_exit
        assert way_out is not None
        return way_out.stream

    def spent(self, flight: Flight, before: CudaEvent | None) -> Spent:
        """Of a step that has ended. `before`: the end of the one launched before it, if the GPU
        was not idle in between."""
        marks, elapsed_s = flight.version.marks, self._runtime.elapsed_s
        late_s = 0.0 if before is None else elapsed_s(before, marks.begin)
        compute_s = max(0.0, elapsed_s(marks.loaded, marks.computed))
        states: tuple[tuple[State, float], ...] = (
            ("prepare", late_s + elapsed_s(marks.begin, marks.inputs)),
            ("wait_activation", elapsed_s(marks.inputs, marks.rows)),
            ("wait_kv", elapsed_s(marks.rows, marks.loaded)),
            ("compute", compute_s),
        )
        return Spent(states, compute_s)

    def land(self, flight: Flight, *, wanted: bool) -> Sampled | None:
        """The step has ended: its tokens, on the last stage, if they are `wanted`."""
        self._versions.give_back(flight.version)
        if self._token_exit is None:
            return None
        if not wanted:
            if flight.tokens is not None:
                self._token_exit.forget(flight.tokens)
            return None
        self._token_exit.note_ended(flight.plan)
        if flight.tokens is None:
            return Sampled([])
        return self._token_exit.tokens(flight.tokens, flight.plan)
