"""Model of Seesaw: prefill as a pipeline, decode tensor-parallel, KV in host memory between.

Modelled: a prefill phase computes prompts on the pipeline and stores their KV in host memory until
that is full or nobody waits; re-sharding; a decode phase runs continuous batching over all GPUs
(see `tensor`), loading buffered requests as room comes free, and lasts until the buffer is empty;
re-sharding back, before which running requests go to host memory too. Re-sharding costs each GPU
the 1 − 1/n of its weights that it lacks, from host memory over its link (`prepare` in the record).
Decode that finds no block free sends the latest request back to the buffer, or computes it again
where the buffer is full. Decode goes on after the buffer is empty for as long as what runs would
fill more than half of it.

Left out, in Seesaw's favour: host memory for the weights' copy, device memory for KV on its way,
waiting for a load (it is hidden behind a step's compute, only its excess counts), and whatever the
simulator's own planning time does not cover. Left out, against it: mixing pipeline and tensor
parallelism within a phase, which Seesaw can choose; here it is all the one or all the other.
"""

from collections import deque

from pipemax.proto.errors import ConfigError
from pipemax.proto.geometry import blocks_for
from pipemax.services.simulator.peers.batching import ContinuousBatching
from pipemax.services.simulator.peers.jobs import Job, Part, Pool, load_of_parts, make_jobs
from pipemax.services.simulator.peers.ledger import Ledger
from pipemax.services.simulator.peers.pipeline import Pipeline, plan_s
from pipemax.services.simulator.peers.tensor import TensorParallel
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

NAME = "model of Seesaw"


def reshard_s(spec: SimulationSpec, weights_bytes: float) -> float:
    """From one layout of the weights to the other; `weights_bytes` of all GPUs together."""
    size = spec.num_gpus
    return weights_bytes / size * (1 - 1 / size) / spec.full_link_bytes_s


class _Seesaw:
    def __init__(self, spec: SimulationSpec, tensor: TensorParallel) -> None:
        if not spec.host_bytes:
            raise ConfigError(f"the {NAME} needs host memory: give --kv-offloading-size a size")
        self.spec = spec
        self.tensor = tensor
        whole = self.tensor.whole
        self.kv_token_s = whole.kv_token_bytes / spec.num_gpus / spec.full_link_bytes_s
        """To move one token's KV, each GPU its part."""
        self.host_blocks = int(spec.host_bytes // (whole.kv_token_bytes * spec.block_size))
        Pool(self.host_blocks // 2, spec.block_size).check_holds(spec, NAME)
        self.pool = Pool(self.tensor.num_blocks, spec.block_size)
        self.pool.check_holds(spec, NAME)
        self.buffered: dict[Job, int] = {}
        """Requests in host memory and their blocks there."""
        self.host_used = 0
        self.ledger = Ledger(spec, self.tensor.num_blocks, self.host_blocks, False)
        self.pipeline = Pipeline(spec, self.ledger)
        self.waiting = deque(make_jobs(spec))
        self.engine = ContinuousBatching(
            (), self.pool, spec.max_num_seqs, spec.max_num_batched_tokens, self._preempt
        )
        self.swapped_tokens = 0
        """Sent to the host by the step being planned."""

    def run(self) -> Result:
        while not self.ledger.over:
            self._prefill_phase()
            self._reshard()
            self._decode_phase()
            if not self.ledger.over:
                self._swap_out_all()
                self._reshard()
        return self.ledger.result()

    # Prefill, on the pipeline

    def _prefill_phase(self) -> None:
        stored_s = ready_s = self.ledger.now_s
        partial: Job | None = None
        while not self.ledger.over:
            parts: list[Part] = []
            budget = self.spec.max_num_batched_tokens
            while budget > 0 and (job := partial or self._next_prompt()):
                tokens = min(budget, job.missing)
                parts.append((job, tokens))
                budget -= tokens
                partial = job if tokens < job.missing else None
            if not parts:
                break
            end_s = self.pipeline.run(load_of_parts(parts), ready_s)
            tokens = sum(tokens for _, tokens in parts)
            stored_s = max(stored_s, end_s) + self._store(tokens)
            going_on = self.ledger.advance(parts, end_s, self.pool)
            for job, _ in parts:
                if job.finished:
                    self._leave_host(job)
            self.engine.waiting.extend(job for job in going_on if job.in_decode)
            self._note()
        self.ledger.now_s = max(self.ledger.now_s, stored_s)

    def _next_prompt(self) -> Job | None:
        if not self.waiting or not self._enter_host(self.waiting[0]):
            return None
        return self.waiting.popleft()

    # Decode, tensor-parallel

    def _decode_phase(self) -> None:
        spec, ledger, engine = self.spec, self.ledger, self.engine
        while not ledger.over:
            self.swapped_tokens = 0
            parts = engine.plan()
            if not parts:
                return
            arrived = [job for job, _ in parts if job in self.buffered]
            for job in arrived:
                self._leave_host(job)
            loaded = sum(job.computed for job in arrived)
            load = load_of_parts(parts)
            compute_s, all_reduce_s = self.tensor.compute_s(load), self.tensor.all_reduce_s(load)
            for gpu in range(spec.num_gpus):
                ledger.spend(gpu, "compute", compute_s)
                ledger.spend(gpu, "send", all_reduce_s)
            step_s = all_reduce_s + max(compute_s, self._load(loaded))
            lost_s = plan_s(spec) + spec.timing.message_s + self._store(self.swapped_tokens)
            ledger.advance(parts, ledger.now_s + step_s + lost_s, self.pool)
            engine.ended()
            self._note()
            if self.waiting and not engine.waiting and 2 * self.pool.used <= self.host_blocks:
                return

    def _preempt(self, job: Job) -> None:
        if self._enter_host(job):
            self.ledger.preemptions += 1
            self.swapped_tokens += job.computed
            self.pool.give_back(job)
        else:
            self.ledger.recompute(job, self.pool)

    # Between the phases

    def _swap_out_all(self) -> None:
        running, self.engine.running = self.engine.running, []
        tokens = 0
        for job in running:
            self.pool.give_back(job)
            if not self._enter_host(job):
                raise AssertionError("half of the buffer was free")
            tokens += job.computed
        self.engine.waiting.extendleft(reversed(running))
        self.ledger.now_s += self._store(tokens)

    def _reshard(self) -> None:
        seconds = reshard_s(self.spec, self.tensor.whole.weights_bytes)
        for gpu in range(self.spec.num_gpus):
            self.ledger.spend(gpu, "prepare", seconds)
        self.ledger.now_s += seconds

    # Host memory

    def _enter_host(self, job: Job) -> bool:
        blocks = blocks_for(job.prompt_tokens + job.generated, self.spec.block_size)
        if self.host_used + blocks > self.host_blocks:
            return False
        self.buffered[job] = blocks
        self.host_used += blocks
        return True

    def _leave_host(self, job: Job) -> None:
        self.host_used -= self.buffered.pop(job)

    def _load(self, tokens: int) -> float:
        seconds = tokens * self.kv_token_s
        self.ledger.load_bytes += seconds * self.spec.full_link_bytes_s
        return seconds

    def _store(self, tokens: int) -> float:
        seconds = tokens * self.kv_token_s
        self.ledger.store_bytes += seconds * self.spec.full_link_bytes_s
        return seconds

    def _note(self) -> None:
        decoding = len(self.engine.waiting) + len(self.engine.running)
        self.ledger.note(len(self.waiting), decoding, self.pool.used, self.host_used)


def simulate_seesaw(spec: SimulationSpec, bus_bytes_s: float | None = None) -> Result:
    """Runs the workload of `spec`. Raises ConfigError without host memory, when the model cannot be
    split over the GPUs, or when the longest request does not fit."""
    return _Seesaw(spec, TensorParallel(spec, bus_bytes_s)).run()
