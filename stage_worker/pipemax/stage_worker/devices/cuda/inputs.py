"""A step's inputs on their way to the GPU, in several versions at fixed addresses.

Each version is a pinned buffer and a device buffer of one layout. The host packs a step while
earlier ones compute, and a stream of its own copies it ahead of time: behind the kernels, the copy
would wait for its turn among the KV on the link. A version is packed again only once the step it
was packed for has ended.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from pipemax.proto.cuda.runtime import CudaEvent, CudaRuntime, Stream
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import SampleRow
from pipemax.stage_worker.attention.device.batch import DeviceStep
from pipemax.stage_worker.attention.device.layout import BatchLayout, pack_step
from pipemax.stage_worker.channels.logits import Shares
from pipemax.stage_worker.devices.cuda.buffers import DeviceBuffer, Gpu, PinnedBuffer
from pipemax.stage_worker.sampling import is_plain_greedy
from pipemax.stage_worker.sampling.shares import share_out

_ALIGNMENT_BYTES: Final = 64
MAX_BANS: Final = 4096
"""Pairs of row and banned token that the device takes out of its logits. A row whose bans are
beyond them is sampled on the host."""


@dataclass(frozen=True, slots=True)
class SampleInputs:
    """How the last stage comes to its tokens. Rows are those of the logits, one per sample row."""

    banned: torch.Tensor | None
    """int64 [bans] on the device: row · vocabulary + token; None where there is none."""
    drawn: torch.Tensor | None
    """int64 [len(drawn_rows)] on the device: rows whose logits go to the host; None likewise."""
    drawn_rows: tuple[int, ...]
    shares: Shares = ()
    """Of `drawn_rows`, in their order, where samplers draw."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What was packed, and is being copied to the device."""

    step: DeviceStep
    num_bytes: int
    """Of the batch, from the device buffer's begin on."""
    sample: SampleInputs | None
    """None where nothing is sampled."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Timed events of one step on the kernels' stream."""

    begin: CudaEvent
    """Its turn has come."""
    inputs: CudaEvent
    """What was packed is there,"""
    rows: CudaEvent
    """so are the rows of the previous stage,"""
    loaded: CudaEvent
    """and its KV: the kernels begin."""
    computed: CudaEvent
    """They have ended."""

    @classmethod
    def create(cls, runtime: CudaRuntime) -> "Marks":
        return cls(*(runtime.create_event(timed=True) for _ in range(5)))

    @property
    def all(self) -> tuple[CudaEvent, ...]:
        return (self.begin, self.inputs, self.rows, self.loaded, self.computed)


class InputVersion:
    """One step's inputs, pinned and on the device, and the events around the step."""

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        runtime = self._runtime = gpu.runtime
        self._pinned = PinnedBuffer.create(runtime, "pipemax-inputs", size_bytes)
        self.device = DeviceBuffer(gpu, size_bytes)
        self._size_bytes = size_bytes
        self.uploaded: CudaEvent = runtime.create_event()
        """Behind the copy of what was packed last."""
        self.marks = Marks.create(runtime)
        self.ended: CudaEvent = runtime.create_event()
        """Behind the step and the copies of what it made."""

    @property
    def free(self) -> bool:
        """The copy of what was packed last has been made. The step must have ended, too."""
        return self._runtime.finished(self.uploaded)

    def pack(
        self,
        step: DeviceStep,
        tile_tokens: int,
        sample: Sequence[SampleRow],
        vocab_size: int,
        upload: Stream,
        num_samplers: int = 0,
    ) -> StepInputs:
        """Writes `step` and queues the copy on `upload`: as its batch is laid out, whose views are
        on this version or on what it is copied to later. `sample` is empty but on the last stage;
        `num_samplers` draw, or that stage itself. Raises InvariantError when it does not fit."""
        layout, columns = step.batch.layout, step.columns
        needed = layout.num_bytes + 8 * (MAX_BANS + len(sample)) + 2 * _ALIGNMENT_BYTES
        if needed > self._size_bytes:
            raise InvariantError(f"a step of {needed} bytes for inputs of {self._size_bytes}")
        num_bytes = pack_step(columns, layout, tile_tokens, self._pinned.bytes)
        self._upload(0, num_bytes, upload)
        bans, shares = _sort_rows(sample, vocab_size, max(1, num_samplers))
        sampling = self._pack_sampling(
            bans, shares if num_samplers else (), _in_order(shares), layout.num_bytes, upload
        )
        self._runtime.record(self.uploaded, upload)
        return StepInputs(
            step,
            num_bytes,
            sampling if sample else None,
        )

    def _pack_sampling(
        self, bans: list[int], shares: Shares, drawn: list[int], begin: int, upload: Stream
    ) -> SampleInputs:
        """Behind the batch, which ends at `begin`."""
        if not bans and not drawn:
            return SampleInputs(None, None, ())
        begin = _align(begin)
        banned_view, end = self._append(np.array(bans, np.int64), begin)
        drawn_view, end = self._append(np.array(drawn, np.int64), end)
        self._upload(begin, end - begin, upload)
        return SampleInputs(
            banned_view if bans else None,
            drawn_view if drawn else None,
            tuple(drawn),
            shares if drawn else (),
        )

    def _append(self, values: npt.NDArray[np.int64], begin: int) -> tuple[torch.Tensor, int]:
        """Writes `values` at `begin`; their view on the device, and where the next may begin."""
        size_bytes = values.nbytes
        self._pinned.bytes[begin : begin + size_bytes] = values.view(np.uint8)
        view = self.device.tensor(values.shape, torch.int64, begin)
        return view, _align(begin + size_bytes)

    def _upload(self, begin: int, size_bytes: int, upload: Stream) -> None:
        target, source = self.device.pointer + begin, self._pinned.pointer + begin
        self._runtime.copy(target, source, size_bytes, upload)

    def close(self) -> None:
        self.device.close()
        self._pinned.close()
        for event in (self.uploaded, self.ended, *self.marks.all):
            self._runtime.destroy_event(event)


class InputVersions:
    """Versions in turn, so that the one given back longest ago is packed next."""

    def __init__(self, versions: Sequence[InputVersion]) -> None:
        self._all = tuple(versions)
        self._idle = deque(versions)

    def take(self) -> InputVersion | None:
        """One that nothing reads any more; None when there is none yet. Where no step is in flight
        that can be only for the moment in which inputs that a reset voided are still copied."""
        if not self._idle or not self._idle[0].free:
            return None
        return self._idle.popleft()

    def give_back(self, version: InputVersion) -> None:
        """The step that it was packed for has ended, or will never run."""
        self._idle.append(version)

    def close(self) -> None:
        for version in self._all:
            version.close()


def inputs_bytes(largest: BatchLayout) -> int:
    """Size of a version that takes any step of no more than `largest`."""
    return _align(largest.num_bytes) + 8 * (MAX_BANS + largest.samples) + 2 * _ALIGNMENT_BYTES


def _sort_rows(
    sample: Sequence[SampleRow], vocab_size: int, num_samplers: int
) -> tuple[list[int], Shares]:
    """(bans for the device, rows for the host by who draws from them)"""
    bans: list[int] = []
    drawn: list[int] = []
    for index, row in enumerate(sample):
        banned = [token for token in row.banned_token_ids if 0 <= token < vocab_size]
        if not is_plain_greedy(row) or len(bans) + len(banned) > MAX_BANS:
            drawn.append(index)
        else:
            bans += [index * vocab_size + token for token in banned]
    return bans, share_out(sample, drawn, num_samplers)


def _in_order(shares: Shares) -> list[int]:
    return [row for share in shares for row in share]


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
