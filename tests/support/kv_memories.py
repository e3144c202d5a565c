"""Host and device memories whose blocks hold tokens (request, index, version) instead of KV.

A block under copy holds TORN at its target until the copy ends. So a copy that starts too early or
a host block given away too soon leaves a wrong token behind, whoever looks at it later.

Copies begin when they are started, or, like steps, whenever a stream that had them queued comes to
them; `StageStreams` knows what they wait for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipemax.kv_daemon.events import Direction, StartCopy

Token = tuple[int, int, int]
Tokens = Mapping[int, Token]
"""By device block."""
TORN: Token = (-1, -1, -1)


@dataclass(eq=False)
class Block:
    """One block of a request, as a coordinator knows it."""

    token: Token
    device: int | None
    filled_by: int
    store_sent: bool = False
    stored: bool = False


@dataclass
class Step:
    """A planned step, by device block."""

    step: int
    reads: dict[int, Token] = field(default_factory=dict)
    fills: dict[int, Token] = field(default_factory=dict)
    wait_for_load: bool = False


@dataclass(eq=False)
class CopyUnderWay:
    command: StartCopy
    device: dict[int, Token]
    """The device pool as it was mapped when the copy started."""
    expected: list[Token]
    """Of a store: what it is to carry, block by block."""
    after: int
    """The step event that it waits for, -1 for none."""
    begun: bool = False
    tokens: list[Token] = field(default_factory=list)
    """What it carries, once it has begun."""
    touches: frozenset[int] = frozenset()
    """Requests whose blocks it carries."""


class Memories:
    """The host pool and every stage's device pool, and the copies between them."""

    def __init__(
        self, num_stages: int, host_blocks: int, depth: int, *, queued: bool = False
    ) -> None:
        self.host_blocks = host_blocks
        self.depth = depth
        self.queued = queued
        self.host: list[dict[int, Token]] = [{} for _ in range(num_stages)]
        self.device: list[dict[int, Token]] = [{} for _ in range(num_stages)]
        self.copies: list[CopyUnderWay] = []
        """Under way, in the order in which they started."""

        self.ended: dict[tuple[int, Direction], int] = {}
        """Number of the last copy that ended, by stage and direction."""

    def restart(self, stage: int) -> None:
        """The stage comes back with another pool; copies under way still write to the old one, and
        wait for nothing that the old process would have done."""
        self.device[stage] = {}
        for copy in self.copies:
            if copy.command.stage == stage:
                copy.after = -1

    def start(self, command: StartCopy, to_store: dict[int, Token]) -> None:
        """Takes a copy on, and begins it unless it is to be queued. `to_store`: device block → what
        a Store says it holds. Fails when the lane is full or another copy has a claim on a host
        block."""
        assert len(self._lane(command)) < self.depth
        claimed = self._claimed(command)
        expected = []
        touches = set()
        for host_block, device_block in pairs(command):
            assert 0 <= host_block < self.host_blocks
            assert host_block not in claimed
            if command.direction == "store":
                expected.append(to_store[device_block])
                touches.add(to_store[device_block][0])
            else:
                touches.add(self.host[command.stage][host_block][0])
        device = self.device[command.stage]
        copy = CopyUnderWay(command, device, expected, command.after, touches=frozenset(touches))
        self.copies.append(copy)
        if not self.queued:
            self.begin(copy, set())

    def begin(self, copy: CopyUnderWay, gone: set[Token]) -> None:
        """Fails when the source is not there yet; blocks that are `gone` may hold anything."""
        copy.begun = True
        host = self.host[copy.command.stage]
        for place, (host_block, device_block) in enumerate(pairs(copy.command)):
            if copy.command.direction == "store":
                token = copy.device.get(device_block, TORN)
                wanted = copy.expected[place]
                alive = copy.device is self.device[copy.command.stage] and wanted not in gone
                assert token == wanted or not alive, "stored too early"
                host[host_block] = TORN
            else:
                token = host[host_block]
                assert token != TORN
                copy.device[device_block] = TORN
            copy.tokens.append(token)

    def end(self, copy: CopyUnderWay) -> None:
        assert copy.begun
        self.copies.remove(copy)
        self.ended[copy.command.stage, copy.command.direction] = copy.command.number
        host = self.host[copy.command.stage]
        for (host_block, device_block), token in zip(pairs(copy.command), copy.tokens, strict=True):
            if copy.command.direction == "store":
                host[host_block] = token
            else:
                copy.device[device_block] = token

    def may_end(self) -> list[CopyUnderWay]:
        """The oldest copy of each stage and direction, begun or not."""
        return [copy for copy in self.copies if self._lane(copy.command)[0] is copy]

    def touching(self, request: int) -> list[CopyUnderWay]:
        """Copies under way that carry a block of `request`."""
        return [copy for copy in self.copies if request in copy.touches]

    def begun_on(self, stage: int) -> list[CopyUnderWay]:
        """Copies that touch the stage's present pool right now."""
        here = self.device[stage]
        return [copy for copy in self.copies if copy.begun and copy.device is here]

    def _lane(self, command: StartCopy) -> list[CopyUnderWay]:
        lane = (command.stage, command.direction)
        return [c for c in self.copies if (c.command.stage, c.command.direction) == lane]

    def _claimed(self, command: StartCopy) -> set[int]:
        """Host blocks of the stage that `command` must not touch: those being written, and for a
        store those being read, too."""
        return {
            host_block
            for copy in self.copies
            if copy.command.stage == command.stage
            if "store" in (copy.command.direction, command.direction)
            for host_block, _ in pairs(copy.command)
        }


@dataclass(eq=False)
class QueuedStep:
    """A step that a stage has launched."""

    step: int
    epoch: int
    event: int
    load: int
    """The load it waits for, -1 for none."""
    reads: dict[int, Token]
    fills: dict[int, Token]
    begun: bool = False


class StageStreams:
    """One stage's GPU: its steps run in order, each behind its load, and copies run beside them.
    Fails when a copy and a step that run at the same time meet in a block."""

    def __init__(self, stage: int, memories: Memories) -> None:
        self._stage = stage
        self._memories = memories
        self.steps: list[QueuedStep] = []
        """Launched and not over, in order."""
        self.passed = -1
        """The last event passed."""
        self._events = -1

    def restart(self) -> None:
        """Another process, with events of its own."""
        self.steps.clear()
        self.passed = self._events = -1

    def launch(self, step: int, epoch: int, load: int, reads: Tokens, fills: Tokens) -> int:
        """Returns the number of the step's event."""
        self._events += 1
        self.steps.append(QueuedStep(step, epoch, self._events, load, dict(reads), dict(fills)))
        return self._events

    def may_begin(self) -> bool:
        """The first step has what it waits for on this GPU."""
        if not self.steps or self.steps[0].begun:
            return False
        return self.steps[0].load <= self._memories.ended.get((self._stage, "load"), -1)

    def begin(self, gone: set[Token], epoch: int) -> None:
        """`gone`: tokens nobody reads any more. What an old epoch's step reads is nobody's
        business, what it writes is."""
        step = self.steps[0]
        step.begun = True
        for copy in self._memories.begun_on(self._stage):
            self._apart(step, copy, gone)
        if step.epoch == epoch:
            device = self._memories.device[self._stage]
            for block, token in step.reads.items():
                assert token in gone or device[block] == token

    def end(self) -> QueuedStep:
        step = self.steps.pop(0)
        self._memories.device[self._stage].update(step.fills)
        self.passed = step.event
        return step

    def may_begin_copy(self, copy: CopyUnderWay) -> bool:
        return not copy.begun and copy.after <= self.passed

    def begin_copy(self, copy: CopyUnderWay, gone: set[Token]) -> None:
        here = self._memories.device[self._stage]
        if copy.device is here and self.steps and self.steps[0].begun:
            self._apart(self.steps[0], copy, gone)
        self._memories.begin(copy, gone)

    def _apart(self, step: QueuedStep, copy: CopyUnderWay, gone: set[Token]) -> None:
        for place, (_, block) in enumerate(pairs(copy.command)):
            if copy.command.direction == "load":
                assert block not in step.reads, "a load meets a step that reads the block"
                assert block not in step.fills, "a load meets a step that fills the block"
            else:
                forgotten = copy.expected[place] in gone
                assert forgotten or block not in step.fills, "a store meets a step that fills"


def pairs(command: StartCopy) -> list[tuple[int, int]]:
    """(host block, device block) of every block of a copy."""
    return [
        (run.host_block + i, run.device_block + i)
        for run in command.runs
        for i in range(run.length)
    ]
