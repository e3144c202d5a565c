"""Model of vLLM-PP: pipeline parallelism as in vLLM 0.7 with chunked prefill, no offloading.

Modelled: one virtual engine per stage, each with a fixed 1/S of the requests (dealt out in turns)
and of the KV blocks; continuous batching within each, prompt chunks mixed into decode, preemption
by recompute; a virtual engine's next step is planned when its tokens are back. Nothing moves
between engines, so that an engine with longer requests is slower and has its pool full earlier.

Left out, in vLLM's favour: Python and Ray overheads beyond the simulator's own planning time,
fragmentation, sampling. Left out, against it: nothing we know of.
"""

import heapq

from pipemax.services.simulator.peers.batching import ContinuousBatching
from pipemax.services.simulator.peers.jobs import Pool, load_of_parts, make_jobs
from pipemax.services.simulator.peers.ledger import Ledger
from pipemax.services.simulator.peers.pipeline import Pipeline, plan_s
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

NAME = "model of vLLM-PP"


def simulate_vllm_pp(spec: SimulationSpec) -> Result:
    """Runs the workload of `spec`. Raises ConfigError when a request exceeds an engine's share."""
    num_engines = spec.num_gpus
    ledger = Ledger(spec, spec.num_device_blocks, 0)
    pipeline = Pipeline(spec, ledger)
    jobs = make_jobs(spec)
    engines = []
    for index in range(num_engines):
        pool = Pool(spec.num_device_blocks // num_engines, spec.block_size)
        pool.check_holds(spec, NAME)
        engines.append(
            ContinuousBatching(
                jobs[index::num_engines],
                pool,
                spec.max_num_seqs,
                spec.max_num_batched_tokens,
                lambda job, pool=pool: ledger.recompute(job, pool),  # type: ignore[misc]
            )
        )
    ready = [(0.0, index) for index in range(num_engines)]
    while ready and not ledger.over:
        at_s, index = heapq.heappop(ready)
        engine = engines[index]
        parts = engine.plan()
        if not parts:
            continue  # this engine has done all its requests
        end_s = pipeline.run(load_of_parts(parts), at_s + plan_s(spec))
        ledger.advance(parts, end_s, engine.pool)
        engine.ended()
        heapq.heappush(ready, (end_s, index))
        ledger.note(
            sum(len(one.waiting) for one in engines),
            sum(len(one.running) for one in engines),
            sum(one.pool.used for one in engines),
        )
    return ledger.result()
