"""A stage on a GPU that remembers its steps and what made it wait, for `host_gap_cuda.py`: it runs
the shipped process and looks over its shoulder.

    python gpu_recording_stage.py OUT [--profile FIRST COUNT] [--simulated] \
        --run-dir DIR --index N [--parent-pipe-fd N]

When the process ends, OUT holds a JSON object:

- `steps`, an object for each step that ended, see `Step`;
- `waits`, [monotonic seconds, call] for every call by which the work loop's thread waited for the
  GPU;
- `profile`, what torch's profiler saw of that thread between two launches of decode steps: the
  number of CUDA calls, and the names of those that wait, with counts. Null without `--profile`.

`--profile FIRST COUNT`: of COUNT decode steps, after FIRST. `--simulated`: on the simulated CUDA of
`tests/support/fake_cuda`.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipemax.proto.messages.control import StepPlan
from pipemax.proto.messages.types import unpack_i32
from pipemax.proto.process import process_main
from pipemax.stage_worker import main as stage
from pipemax.stage_worker.devices.cuda.step import CudaSteps, Flight, Spent
from pipemax.stage_worker.step_queue import StepQueue

WAITING_CALLS = (
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaMemcpy2D",
    "cudaMemset",
    "cudaFree",
    "cudaFreeHost",
    "cudaHostUnregister",
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyDtoD_v2",
    "cuMemFree_v2",
)
"""Of the CUDA runtime and the driver: those that make the calling thread wait for the GPU."""


@dataclass(slots=True)
class Step:
    """Times in seconds; those ending in `_at_s` by this process's monotonic clock."""

    step: int
    decodes: int
    """Requests; 0 if the step computed any prompt tokens."""
    ready_at_s: float
    """When the last of plan, activations and KV was announced here."""
    launched_at_s: float = 0.0
    """When everything was queued."""
    landed_at_s: float = 0.0
    ahead: bool = False
    """It was queued before the step in front of it had ended, as this process knows it."""
    late_s: float = 0.0
    """Of the GPU between the two, waiting for this process: from the end of the step in front until
    the kernels of this one could begin, what it waited for other processes apart. 0 unless
    `ahead`."""
    waited_s: float = 0.0
    """Of the GPU, for activations and KV."""
    compute_s: float = 0.0
    profiled: bool = False


class Recorder:
    """What one process did."""

    def __init__(self, profile: tuple[int, int] | None) -> None:
        self.steps: list[Step] = []
        self.waits: list[tuple[float, str]] = []
        self.profiler = None if profile is None else Profiler(*profile)
        self._arrived_s: dict[int, float] = {}
        self._launched: dict[int, Step] = {}
        self._loop = threading.get_ident()

    def arrived(self, step: int) -> None:
        self._arrived_s[step] = time.monotonic()

    def launched(self, plan: StepPlan) -> None:
        counts = unpack_i32(plan.num_tokens)
        decodes = len(counts) if max(counts) == 1 else 0
        ready_at_s = self._arrived_s.pop(plan.step, 0.0)
        one = Step(plan.step, decodes, ready_at_s, launched_at_s=time.monotonic())
        if self.profiler is not None and decodes:
            one.profiled = self.profiler.after_launch()
        self._launched[plan.step] = one

    def landed(self, plan: StepPlan, spent: Spent, ahead: bool) -> None:
        one = self._launched.pop(plan.step)
        states = dict(spent.states)
        one.landed_at_s, one.ahead, one.compute_s = time.monotonic(), ahead, spent.compute_s
        one.late_s = states["prepare"] if ahead else 0.0
        one.waited_s = states["wait_activation"] + states["wait_kv"]
        self.steps.append(one)

    def waited(self, call: str) -> None:
        if threading.get_ident() == self._loop:
            self.waits.append((time.monotonic(), call))

    def write(self, out: Path) -> None:
        profile = None if self.profiler is None else self.profiler.found
        out.write_text(
            json.dumps(
                {
                    "steps": [asdict(one) for one in self.steps],
                    "waits": self.waits,
                    "profile": profile,
                }
            )
        )


class Profiler:
    """torch's profiler over some decode steps."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count = first, count
        self._seen = 0
        self._profile: Any = None
        self.found: dict[str, Any] | None = None

    def after_launch(self) -> bool:
        """Starts or ends the profile where it is time; whether this step was disturbed by it."""
        import torch

        self._seen += 1
        if self._seen == self._first:
            self._profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CUDA,
                            torch.profiler.ProfilerActivity.CPU]
            )  # fmt: skip
            self._profile.start()
        elif self._seen == self._first + self._count:
            self._profile.stop()
            self.found = calls_of_thread(self._events(), threading.get_native_id())
            self._profile = None
            return True
        return self._profile is not None

    def _events(self) -> list[dict[str, Any]]:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            self._profile.export_chrome_trace(file.name)
            events: list[dict[str, Any]] = json.loads(Path(file.name).read_text())["traceEvents"]
        return events


def calls_of_thread(events: list[dict[str, Any]], thread: int) -> dict[str, Any]:
    """CUDA calls of one thread between its first and its last launch of kernels: outside of that
    the profiler itself waits for the GPU. `events` as in a Chrome trace."""
    calls = sorted(
        (float(event["ts"]), str(event["name"]))
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and event.get("tid") == thread
    )
    launches = [at for at, name in calls if "Launch" in name]
    if not launches:
        return {"calls": 0, "waiting": {}}
    names = Counter(name for at, name in calls if launches[0] <= at <= launches[-1])
    waiting = {name: count for name, count in names.items() if name in WAITING_CALLS}
    return {"calls": sum(names.values()), "waiting": waiting}


def look_over(recorder: Recorder) -> None:
    """Puts the recorder between the shipped stage's parts."""
    launch, spent = CudaSteps.launch, CudaSteps.spent
    add_plan, add_rows, add_loaded = StepQueue.add_plan, StepQueue.add_rows, StepQueue.add_loaded

    def recorded_launch(self: CudaSteps, prepared: Any, rows: Any, last_load: int) -> Flight:
        flight = launch(self, prepared, rows, last_load)
        recorder.launched(flight.plan)
        return flight

    def recorded_spent(self: CudaSteps, flight: Flight, before: Any) -> Spent:
        found = spent(self, flight, before)
        recorder.landed(flight.plan, found, before is not None)
        return found

    def recorded_plan(self: StepQueue, plan: StepPlan) -> None:
        recorder.arrived(plan.step)
        add_plan(self, plan)

    def recorded_rows(self: StepQueue, epoch: int, step: int, rows: Any) -> None:
        recorder.arrived(step)
        add_rows(self, epoch, step, rows)

    def recorded_loaded(self: StepQueue, epoch: int, step: int, copy: int = -1) -> None:
        recorder.arrived(step)
        add_loaded(self, epoch, step, copy)

    CudaSteps.launch = recorded_launch  # type: ignore[method-assign]
    CudaSteps.spent = recorded_spent  # type: ignore[method-assign]
    StepQueue.add_plan = recorded_plan  # type: ignore[method-assign]
    StepQueue.add_rows = recorded_rows  # type: ignore[method-assign]
    StepQueue.add_loaded = recorded_loaded  # type: ignore[method-assign]


def count_waits(runtime: type[Any], recorder: Recorder) -> None:
    """Every call of a CudaRuntime that waits for the GPU."""
    for name in ("synchronize", "synchronize_event"):
        setattr(runtime, name, _told(getattr(runtime, name), name, recorder))


def _told(call: Any, name: str, recorder: Recorder) -> Any:
    def told(self: Any, *arguments: Any) -> Any:
        recorder.waited(name)
        return call(self, *arguments)

    return told


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=int, nargs=2)
    parser.add_argument("--simulated", action="store_true")
    asked, rest = parser.parse_known_args()
    recorder = Recorder(asked.profile and tuple(asked.profile))
    look_over(recorder)
    body = stage.body
    if asked.simulated:
        sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
        from support.fake_cuda import FakeCuda
        from support.fake_cuda.bodies import stage as body

        count_waits(FakeCuda, recorder)
    else:
        from pipemax.proto.cuda.cupy_runtime import CupyRuntime

        count_waits(CupyRuntime, recorder)

    def recorded_body(run_dir: Path, index: int) -> None:
        try:
            body(run_dir, index)
        finally:
            recorder.write(asked.out)

    return process_main("stage", recorded_body, rest)


if __name__ == "__main__":
    sys.exit(main())
