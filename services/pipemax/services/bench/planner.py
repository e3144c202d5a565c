"""What planning costs the coordinator, without processes.

The shipped scheduling core is driven by perfect stages and a perfect KV daemon: every step comes
back, every block is stored, at once and at no cost; only the core's own time is taken. Requests
have lognormal lengths; finished ones are replaced.
"""

import math
import random
import time
from collections import defaultdict, deque
from dataclasses import dataclass

from pipemax.coordinator.core import Scheduler
from pipemax.coordinator.events import (
    BlocksStored,
    Command,
    Event,
    KvReleased,
    LinkMeasured,
    Resumed,
    StageComputed,
    StepReturned,
    Submitted,
    ToDaemon,
    ToStages,
)
from pipemax.coordinator.policy import DEFAULT_POLICY, make_policy
from pipemax.coordinator.state import SchedulerLimits
from pipemax.proto.errors import ConfigError
from pipemax.proto.messages.control import Release, StepPlan, Store
from pipemax.proto.messages.ingest import SamplingParams
from pipemax.proto.wire import encode

BLOCK_SIZE = 16
BLOCK_BYTES = 2**20
STORED_AT_ONCE = 16
"""Blocks in one report of the daemon."""
STEP_S = 0.05
_WARM_UP_STEPS = 20_000
_FIRST_REQUESTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerLoad:
    """How much there is to plan."""

    requests: int = 2000
    """Running at a time."""
    waiting: int = 8
    stages: int = 8
    device_blocks: int = 230_000
    host_blocks: int = 200_000
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    link_blocks: float = 2000
    """That the link carries in a step."""
    policy: str = DEFAULT_POLICY
    prompt_tokens: int = 1200
    output_tokens: int = 400
    """Medians; sigma is 0.6."""


class PlannerBench:
    """The core, and the least there must be around it."""

    def __init__(self, options: PlannerLoad) -> None:
        self.options = options
        self.random = random.Random(0)
        self.scheduler = Scheduler(
            SchedulerLimits(
                block_size=BLOCK_SIZE,
                num_slots=options.stages,
                max_num_seqs=options.max_num_seqs,
                max_num_batched_tokens=options.max_num_batched_tokens,
                max_model_len=32_768,
                eos_token_ids=frozenset({2}),
            ),
            make_policy(options.policy),
        )
        self.plans: deque[StepPlan] = deque()
        self.stores: dict[int, Store] = {}
        self.events: deque[Event] = deque()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.step_s: list[float] = []
        """Of each turn, all its events together, without encoding and what new requests cost."""
        self.busy_s = 0.0
        self.next_key = 0
        self.steps = 0
        self.tell(
            Resumed(
                1,
                options.device_blocks,
                options.host_blocks,
                [BLOCK_BYTES] * options.stages,
                device_kept=False,
                host_kept=False,
            )
        )

    def tell(self, event: Event) -> None:
        start = time.thread_time()
        commands = self.scheduler.handle(event, start)
        spent = time.thread_time() - start
        self.busy_s += spent
        self.seconds[type(event).__name__].append(spent)
        for command in commands:
            self._carry_out(command)

    def submit(self) -> None:
        draw, load = self.random, self.options
        prompt_mu, output_mu = math.log(load.prompt_tokens), math.log(load.output_tokens)
        prompt = [5] * min(16_000, max(16, int(draw.lognormvariate(prompt_mu, 0.6))))
        outputs = min(4_000, max(16, int(draw.lognormvariate(output_mu, 0.6))))
        sampling = SamplingParams(max_tokens=outputs, ignore_eos=True)
        self.tell(Submitted(self.next_key, prompt, sampling, seed=0))
        self.next_key += 1

    def turn(self) -> None:
        """The oldest step comes back, and what the daemon has to say about it."""
        before = self.busy_s
        plan = self.plans.popleft()
        self.steps += 1
        for stage in range(self.options.stages):
            self.tell(StageComputed(stage, plan.step, STEP_S))
        self.tell(StepReturned(plan.step, [5] * len(plan.sample)))
        store = self.stores.pop(plan.step, None)
        moves = store.blocks if store else ()
        for first in range(0, len(moves), STORED_AT_ONCE):
            piece = moves[first : first + STORED_AT_ONCE]
            self.tell(BlocksStored([m.request for m in piece], [m.index for m in piece]))
        while self.events:
            self.tell(self.events.popleft())
        if self.steps % 8 == 0:
            stages = self.options.stages
            load_bytes = int(self.options.link_blocks * BLOCK_BYTES / STEP_S)
            self.tell(LinkMeasured([load_bytes] * stages, [1.0] * stages))
        self.step_s.append(self.busy_s - before)
        while len(self.scheduler.state.waiting) < self.options.waiting:
            self.submit()

    def _carry_out(self, command: Command) -> None:
        match command:
            case ToStages(plan):
                self.plans.append(plan)
                self._encode(plan)
            case ToDaemon(Store() as store):
                self.stores[store.after] = store
                self._encode(store)
            case ToDaemon(Release() as release):
                self.events.append(KvReleased(release.requests))
            case ToDaemon(message):
                self._encode(message)

    def _encode(self, message: object) -> None:
        start = time.thread_time()
        encode(message)  # type: ignore[arg-type]
        self.seconds[f"encode {type(message).__name__}"].append(time.thread_time() - start)

    def warm_up(self) -> None:
        """Until as many requests as asked for run. Raises ConfigError when they never do."""
        state = self.scheduler.state
        while len(state.waiting) + len(state.running) < _FIRST_REQUESTS:
            self.submit()
        for _ in range(_WARM_UP_STEPS):
            if len(state.running) >= self.options.requests:
                self.seconds.clear()
                self.step_s.clear()
                return
            self.turn()
        raise ConfigError(
            f"only {len(state.running)} of --requests {self.options.requests} run at once: ask for "
            "fewer, or for more --device-blocks, --host-blocks or --max-num-seqs"
        )
