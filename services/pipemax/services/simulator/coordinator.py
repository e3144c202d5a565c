"""The coordinator's cores (assembly and scheduler) with modelled messages: what its shell does."""

from collections.abc import Callable

from pipemax.coordinator.assembly import Action, Assembly, ResetAll
from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Command,
    Event,
    FinishRequest,
    KvReleased,
    LinkMeasured,
    Paused,
    Resumed,
    StageComputed,
    StepReturned,
    Submitted,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.phases import make_prefill
from pipemax.coordinator.policy import make_policy
from pipemax.coordinator.state import SchedulerLimits
from pipemax.proto.errors import InvariantError
from pipemax.proto.messages.control import (
    Drop,
    Hello,
    KvReady,
    KvReport,
    LinkTotals,
    Prefetch,
    Release,
    Released,
    Reset,
    ResetDone,
    StageReady,
    StepPlan,
    Store,
    Stored,
)
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.messages.types import Message
from pipemax.services.simulator.engine import EventLoop, to_ns
from pipemax.services.simulator.spec import SimulationSpec

END_OF_SEQUENCE = 0
DaemonOrder = Drop | Prefetch | Release | Store


class ModelledCoordinator:
    """Feeds the shipped cores and carries out their commands."""

    def __init__(
        self,
        spec: SimulationSpec,
        loop: EventLoop,
        send_plan: Callable[[StepPlan], None],
        send_reset: Callable[[Reset], None],
        to_daemon: Callable[[DaemonOrder], None],
        on_event: Callable[[], None],
    ) -> None:
        self.scheduler = Scheduler(
            SchedulerLimits(
                block_size=spec.block_size,
                num_slots=spec.num_gpus,
                max_num_seqs=spec.max_num_seqs,
                max_num_batched_tokens=spec.max_num_batched_tokens,
                max_model_len=spec.workload.max_model_len,
                eos_token_ids=frozenset({END_OF_SEQUENCE}),
            ),
            make_policy(spec.policy),
            make_prefill(spec.prefill, spec.num_gpus),
        )
        self.assembly = Assembly(spec.num_gpus)
        self.outputs: dict[int, int] = {}
        """Output tokens of finished requests, by key."""
        self.finished_at_s: list[float] = []
        """When each request finished, in order."""
        self._loop = loop
        self._plan_ns = to_ns(spec.timing.plan_s)
        self._send_plan = send_plan
        self._send_reset = send_reset
        self._to_daemon = to_daemon
        self._on_event = on_event
        self._links = (LinkTotals(),) * spec.num_gpus
        self._last_out_ns = 0
        self.first_ready_ns: int | None = None
        """When the system was whole for the first time."""

    def submit_all(self, spec: SimulationSpec) -> None:
        """All requests of the workload, at once. A request's seed is its key: by it the modelled
        last stage knows how long the output is; the scheduler does not."""
        longest = spec.workload.max_tokens
        for key, lengths in enumerate(spec.workload.requests):
            sampling = SamplingParams(max_tokens=lengths.max_tokens or longest)
            self.tell(Submitted(key, [1] * lengths.prompt_tokens, sampling, seed=key))

    # Messages

    def hello(self, name: str, message: Hello) -> None:
        self._act(self.assembly.hello(name, message))

    def ready(self, name: str, message: StageReady | KvReady) -> None:
        self._act(self.assembly.ready(name, message))

    def reset_done(self, name: str, message: ResetDone) -> None:
        self._act(self.assembly.reset_done(name, message.epoch, message.num_host_blocks))

    def step_done(
        self,
        epoch: int,
        stage: int,
        step: int,
        compute_s: float,
        wait_kv_s: float,
        tokens: list[int] | None,
    ) -> None:
        """A stage's StepDone arrives; `tokens` come from the last stage."""
        if not self._is_current(epoch):
            return
        self.tell(StageComputed(stage, step, compute_s, wait_kv_s))
        if tokens is not None:
            self.tell(StepReturned(step, tokens))

    def from_daemon(self, name: str, message: Message) -> None:
        match message:
            case ResetDone():
                self.reset_done(name, message)
            case Stored() if self._is_current(message.epoch):
                self.tell(BlocksStored(message.requests, message.indices))
            case Released() if self._is_current(message.epoch):
                self.tell(KvReleased(message.requests))
            case KvReport(links=links):
                before, self._links = self._links, links
                pairs = list(zip(before, links, strict=True))
                self.tell(
                    LinkMeasured(
                        [new.load_bytes - old.load_bytes for old, new in pairs],
                        [new.load_seconds - old.load_seconds for old, new in pairs],
                    )
                )
            case _:
                pass  # of an epoch that ended

    # Carrying out

    def tell(self, event: Event) -> None:
        """Feeds the scheduling core. Plans, and what goes to the daemon with them, leave in the
        order of the core's commands once the time to plan is over."""
        commands = self.scheduler.handle(event, self._loop.now)
        if commands:
            plans = any(isinstance(command, ToStages) for command in commands)
            ready_ns = self._loop.now_ns + (self._plan_ns if plans else 0)
            leave_ns = max(self._last_out_ns, ready_ns)
            if leave_ns > self._loop.now_ns:
                self._last_out_ns = leave_ns
                self._loop.at(leave_ns, self._carry_out, commands)
            else:
                self._carry_out(commands)
        self._on_event()

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case ToStages(message):
                    self._send_plan(message)
                case ToDaemon(message):
                    self._to_daemon(message)
                case FinishRequest(key, token_ids):
                    if key in self.outputs:
                        raise InvariantError(f"request {key} finished twice")
                    self.outputs[key] = len(token_ids)
                    self.finished_at_s.append(self._loop.now)

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case ResetAll(message):
                    self._send_reset(message)
                case Paused() | Resumed():
                    if self.first_ready_ns is None:
                        self.first_ready_ns = self._loop.now_ns
                    self.tell(action)

    def _is_current(self, epoch: int) -> bool:
        return self.assembly.running and epoch == self.assembly.epoch
