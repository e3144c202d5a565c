"""Model of TD-Pipe: long prefill phases alternate with long decode phases on a pipeline.

Modelled, by the published rules: prefill batches follow one another without gaps until the
predicted KV use over the coming decode steps peaks at 0.9 of the blocks; then decode, every
dispatch drawing ⌊requests in decode / S⌋ from one shared pool (work stealing); back to prefill when
decode efficiency falls below that of switching. Efficiencies are our reading: of decode, the rate
at the present batch to the rate at the batch the phase began with; of switching, P/(P + B), P the
length of the prefill phase that the free room allows, B = (S − 1) prefill batches to fill the
pipeline. No offloading to host memory.

Left out, in TD-Pipe's favour: its predictor errs, ours knows output lengths; its control plane
costs nothing beyond the simulator's own planning time. Left out, against it: nothing we know of.
"""

from collections import deque
from collections.abc import Iterator

from pipemax.proto.geometry import blocks_for
from pipemax.services.simulator.peers.jobs import Job, Part, Pool, load_of_parts, make_jobs
from pipemax.services.simulator.peers.ledger import Ledger
from pipemax.services.simulator.peers.pipeline import Pipeline, plan_s
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

NAME = "model of TD-Pipe"
PEAK_SHARE = 0.9
"""Of the blocks: where prefill stops."""
_STRIDE = 8
"""Decode steps between the points of the forecast."""


class KvForecast:
    """Blocks in use over the coming decode steps if all requests decode in lockstep."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: list[int] = []

    @property
    def peak(self) -> int:
        return max(self._blocks, default=0)

    def add(self, job: Job) -> None:
        tokens = job.prompt_tokens + job.generated
        remaining = job.output_tokens - job.generated
        points = range(0, remaining, _STRIDE)
        self._blocks += [0] * (len(points) - len(self._blocks))
        for index, step in enumerate(points):
            # The last of the steps up to the next point needs most.
            most = tokens + min(step + _STRIDE, remaining)
            self._blocks[index] += blocks_for(most, self._block_size)

    def peak_with(self, job: Job) -> int:
        """The peak if `job` joined; costs as much as `add`."""
        trial = KvForecast(self._block_size)
        trial._blocks = self._blocks.copy()
        trial.add(job)
        return trial.peak


class _TdPipe:
    def __init__(self, spec: SimulationSpec) -> None:
        self.spec = spec
        self.pool = Pool(spec.num_device_blocks, spec.block_size)
        self.pool.check_holds(spec, NAME)
        self.ledger = Ledger(spec, spec.num_device_blocks, 0)
        self.pipeline = Pipeline(spec, self.ledger)
        self.waiting = deque(make_jobs(spec))
        self.ready: deque[Job] = deque()
        """In decode and on no stage: the pool that dispatches draw from."""
        self.in_flight: deque[tuple[float, list[Part], list[Job]]] = deque()
        """Oldest first: when it ends, the decode parts to advance then, requests that only then
        are ready."""
        self.num_in_flight = 0
        self.last_back_s = 0.0
        """When the newest tokens came back."""
        self.slowest = max(spec.stages, key=lambda stage: stage.num_layers)

    @property
    def num_decoding(self) -> int:
        return len(self.ready) + self.num_in_flight

    def _decoding(self) -> Iterator[Job]:
        yield from self.ready
        for _, parts, jobs in self.in_flight:
            yield from (job for job, _ in parts)
            yield from jobs

    def run(self) -> Result:
        while not self.ledger.over:
            self._prefill_phase()
            self._decode_phase()
        return self.ledger.result()

    def _prefill_phase(self) -> None:
        forecast = KvForecast(self.spec.block_size)
        for job in self._decoding():
            forecast.add(job)
        chunked: Job | None = None
        while not self.ledger.over:
            parts: list[Part] = []
            budget = self.spec.max_num_batched_tokens
            while budget > 0:
                if chunked is None:
                    chunked = self._admit(forecast)
                if chunked is None:
                    break
                tokens = min(budget, chunked.missing)
                parts.append((chunked, tokens))
                budget -= tokens
                if tokens < chunked.missing:
                    break  # the rest of this prompt begins the next batch
                chunked = None
            if not parts:
                return
            self._send_prefill(parts)

    def _admit(self, forecast: KvForecast) -> Job | None:
        """The next request, if the forecast allows it; a request alone always may."""
        if not self.waiting:
            return None
        job = self.waiting[0]
        wanted = self.pool.wants(job, job.prompt_tokens + job.generated)
        too_much = forecast.peak_with(job) > PEAK_SHARE * self.pool.num_blocks
        if (too_much and self.pool.used) or wanted > self.pool.free:
            return None
        self.waiting.popleft()
        forecast.add(job)
        self.pool.take(job, job.prompt_tokens + job.generated)
        return job

    def _send_prefill(self, parts: list[Part]) -> None:
        end_s = self.pipeline.run(load_of_parts(parts), self.pipeline.first_free_s)
        going_on = self.ledger.advance(parts, end_s, self.pool)
        whole = [job for job in going_on if job.in_decode]
        self.num_in_flight += len(whole)
        self.in_flight.append((end_s, [], whole))
        self._note()

    def _decode_phase(self) -> None:
        """Until switching pays or nobody is left."""
        began_with = self.num_decoding
        dispatches = 0
        while self.num_decoding and not self.ledger.over:
            self._collect(self.pipeline.first_free_s)
            if not self.ready or len(self.in_flight) >= self.spec.num_gpus:
                self._collect(self.in_flight[0][0])  # one dispatch for each batch that is back
                continue
            dispatches += 1
            if dispatches % self.spec.num_gpus == 0 and self._switching_pays(began_with):
                return
            self._dispatch()

    def _collect(self, at_s: float) -> None:
        """What has ended by then is ready again."""
        while self.in_flight and self.in_flight[0][0] <= at_s:
            end_s, parts, jobs = self.in_flight.popleft()
            self.num_in_flight -= len(parts) + len(jobs)
            if parts:
                self.ready.extend(self.ledger.advance(parts, end_s, self.pool))
            self.ready.extend(jobs)
            self.last_back_s = end_s

    def _dispatch(self) -> None:
        share = max(1, self.num_decoding // self.spec.num_gpus)
        parts: list[Part] = []
        while self.ready and len(parts) < min(share, self.spec.max_num_seqs):
            job = self.ready.popleft()
            while self.pool.wants(job, job.computed + 1) > self.pool.free:
                latest = self.ready.pop() if self.ready else job
                self.ledger.recompute(latest, self.pool)
                self.waiting.appendleft(latest)
                if latest is job:
                    break
            if job.computed:
                self.pool.take(job, job.computed + 1)
                parts.append((job, 1))
        if not parts:
            return
        self.num_in_flight += len(parts)
        at_s = max(self.pipeline.first_free_s, self.last_back_s + plan_s(self.spec))
        end_s = self.pipeline.run(load_of_parts(parts), at_s)
        self.in_flight.append((end_s, parts, []))
        self._note()

    def _switching_pays(self, began_with: int) -> bool:
        if not self.waiting:
            return False
        spec, load, slots = self.spec, self.spec.workload, self.spec.num_gpus
        context = load.mean_decode_context

        def rate(requests: int) -> float:
            batch = requests / slots
            return batch / self.slowest.decode_s(batch, batch * context)

        whole = blocks_for(round(load.mean_in + load.mean_out), spec.block_size)
        room = max(0.0, PEAK_SHARE * self.pool.num_blocks - self.pool.used) / whole
        speed = self.slowest.prefill_tokens_s(load.mean_in, spec.max_num_batched_tokens)
        prefill_s = min(room, len(self.waiting)) * load.mean_in / speed
        fill_s = (slots - 1) * spec.max_num_batched_tokens / speed
        if not prefill_s:
            return False
        return rate(self.num_decoding) / rate(began_with) < prefill_s / (prefill_s + fill_s)

    def _note(self) -> None:
        self.ledger.note(len(self.waiting), self.num_decoding, self.pool.used)


def simulate_td_pipe(spec: SimulationSpec) -> Result:
    """Runs the workload of `spec`. Raises ConfigError when the longest request does not fit."""
    return _TdPipe(spec).run()
