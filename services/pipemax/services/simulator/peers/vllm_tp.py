"""Model of vLLM-TP: tensor parallelism over the same GPUs, no offloading.

Modelled: one engine with all KV blocks, continuous batching with prompt chunks mixed into decode,
preemption by recompute; a step computes on all GPUs at once and waits for its all-reduces (see
`tensor`; in the record they are `send`); the next step is planned when the tokens are back.

Left out, in vLLM's favour: Python overheads beyond the simulator's own planning time,
fragmentation, sampling, unequal progress of the GPUs, an all-reduce slower than the host links
allow. Left out, against it: computing while all-reducing, which vLLM 0.7 does not do.
"""

from pipemax.services.simulator.peers.batching import ContinuousBatching
from pipemax.services.simulator.peers.jobs import Pool, load_of_parts, make_jobs
from pipemax.services.simulator.peers.ledger import Ledger
from pipemax.services.simulator.peers.pipeline import plan_s
from pipemax.services.simulator.peers.tensor import TensorParallel
from pipemax.services.simulator.records import Result
from pipemax.services.simulator.spec import SimulationSpec

NAME = "model of vLLM-TP"


def simulate_vllm_tp(spec: SimulationSpec, bus_bytes_s: float | None = None) -> Result:
    """Runs the workload of `spec`; `bus_bytes_s` as in TensorParallel. Raises ConfigError when the
    model cannot be split or the longest request does not fit."""
    tensor = TensorParallel(spec, bus_bytes_s)
    ledger = Ledger(spec, tensor.num_blocks, 0)
    pool = Pool(tensor.num_blocks, spec.block_size)
    pool.check_holds(spec, NAME)
    engine = ContinuousBatching(
        make_jobs(spec),
        pool,
        spec.max_num_seqs,
        spec.max_num_batched_tokens,
        lambda job: ledger.recompute(job, pool),
    )
    while not ledger.over and (parts := engine.plan()):
        load = load_of_parts(parts)
        compute_s, all_reduce_s = tensor.compute_s(load), tensor.all_reduce_s(load)
        for gpu in range(spec.num_gpus):
            ledger.spend(gpu, "compute", compute_s)
            ledger.spend(gpu, "send", all_reduce_s)
        lost_s = plan_s(spec) + spec.timing.message_s
        ledger.advance(parts, ledger.now_s + lost_s + compute_s + all_reduce_s, pool)
        engine.ended()
        ledger.note(len(engine.waiting), len(engine.running), pool.used)
    return ledger.result()
