"""The pipeline's clock for the models of peers: a step takes its time on every stage in turn."""

from pipemax.services.simulator.peers.ledger import Ledger
from pipemax.services.simulator.spec import SimulationSpec
from pipemax.stage_worker.modelled.roofline import StepLoad


class Pipeline:
    """When steps run on the stages of a pipeline: in order, each as soon as its activations are
    there and the stage is free."""

    def __init__(self, spec: SimulationSpec, ledger: Ledger) -> None:
        self._spec = spec
        self._ledger = ledger
        self._free_s = [0.0] * spec.num_gpus

    @property
    def first_free_s(self) -> float:
        """When the first stage can begin another step."""
        return self._free_s[0]

    def run(self, load: StepLoad, ready_s: float) -> float:
        """Sends a step through all stages, after those sent before; returns when its tokens are
        back. `ready_s`: when the first stage may begin."""
        spec = self._spec
        at_s = ready_s
        seconds: dict[int, float] = {}
        for index, stage in enumerate(spec.stages):
            if stage.num_layers not in seconds:
                seconds[stage.num_layers] = stage.step_s(load)
            if index:
                at_s += spec.hop_s(load.decode_rows + load.prefill_rows)
            compute_s = seconds[stage.num_layers]
            at_s = max(at_s, self._free_s[index]) + compute_s
            self._free_s[index] = at_s
            self._ledger.spend(index, "compute", compute_s)
        return at_s + spec.timing.message_s


def plan_s(spec: SimulationSpec) -> float:
    """From tokens to the next step at the first stage: planning and a message."""
    return spec.timing.plan_s + spec.timing.message_s
