"""Random workloads, pools and faults against the shipped cores, invariants checked all along."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipemax.services.simulator.faults import Fault
from pipemax.services.simulator.spec import SimulationSpec, Timing
from pipemax.services.simulator.workload import lognormal
from pipemax.services.simulator.world import World
from pipemax.stage_worker.modelled.catalogue import load_catalogue

CATALOGUE = load_catalogue()
STAGES = 3


def faults() -> st.SearchStrategy[Fault]:
    crash = st.builds(
        Fault,
        st.sampled_from(["crash-stage", "crash-daemon"]),
        st.integers(0, STAGES - 1),
        st.floats(0.05, 2.0),
        st.floats(0.01, 0.5),
    )
    slow = st.builds(
        Fault,
        st.sampled_from(["slow-link", "slow-stage"]),
        st.integers(0, STAGES - 1),
        st.floats(0.05, 2.0),
        st.floats(0.1, 2.0),
        st.floats(0.05, 0.5),
    )
    return crash | slow


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 1000),
    mean_in=st.integers(5, 150),
    mean_out=st.integers(30, 60),
    spare_blocks=st.integers(0, 40),
    host_gb=st.sampled_from([0.0, 0.5, 20.0]),
    policy=st.sampled_from(["oldest-first", "pipemax", "fcfs", "static-prefetch:0.2"]),
    broken=st.lists(faults(), max_size=3),
)
def test_everything_finishes_whatever_happens(
    seed: int,
    mean_in: int,
    mean_out: int,
    spare_blocks: int,
    host_gb: float,
    policy: str,
    broken: list[Fault],
) -> None:
    workload = lognormal("test", mean_in, mean_out, 25, seed, sigma=0.7)
    longest = -(-workload.max_model_len // 16) + 1
    spec = SimulationSpec(
        gpu=CATALOGUE.gpu("rtx-3090"),
        num_gpus=STAGES,
        model=CATALOGUE.model("llama-2-13b"),
        workload=workload,
        device_blocks=longest + spare_blocks,
        host_bytes=round(host_gb * 1e9),
        block_size=16,
        max_num_batched_tokens=256,
        policy=policy,
        seed=seed,
        timing=Timing(load_s=0.1, link_jitter=0.1, compute_jitter=0.1),
        faults=tuple(broken),
        piece_bytes=2**22,
    )
    world = World(spec, check_every=8)
    result = world.run()
    expected = {key: lengths.output_tokens for key, lengths in enumerate(workload.requests)}
    assert result.outputs == expected
    state = world.coordinator.scheduler.state
    assert not state.running
    assert not state.waiting
    for stage in world.stages:
        total = sum(stage.record.spent_ns.values())
        assert total == world.loop.now_ns
