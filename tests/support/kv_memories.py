"""Host and device memories whose blocks hold tokens (request, index, version) instead of KV.

A block under copy holds TORN at its target until the copy ends. So a copy that starts too early or
a host block given away too soon leaves a wrong token behind, whoever looks at it later.
"""

from dataclasses import dataclass, field

from pipemax.kv_daemon.events import StartCopy

Token = tuple[int, int, int]
TORN: Token = (-1, -1, -1)


@dataclass(eq=False)
class CopyUnderWay:
    command: StartCopy
    device: dict[int, Token]
    """The device pool as it was mapped when the copy started."""
    tokens: list[Token] = field(default_factory=list)
    """What it carries, block by block."""


class Memories:
    """The host pool and every stage's device pool, and the copies between them."""

    def __init__(self, num_stages: int, host_blocks: int, depth: int) -> None:
        self.host_blocks = host_blocks
        self.depth = depth
        self.host: list[dict[int, Token]] = [{} for _ in range(num_stages)]
        self.device: list[dict[int, Token]] = [{} for _ in range(num_stages)]
        self.copies: list[CopyUnderWay] = []
        """Under way, in the order in which they started."""

    def restart(self, stage: int) -> None:
        """The stage comes back with another pool; copies under way still write to the old one."""
        self.device[stage] = {}

    def start(self, command: StartCopy, to_store: dict[int, Token]) -> None:
        """Begins a copy. `to_store`: device block → what a Store says it holds. Fails when the
        lane is full, the source is not there yet or another copy has a claim on a host block."""
        assert len(self._lane(command)) < self.depth
        device, host = self.device[command.stage], self.host[command.stage]
        copy = CopyUnderWay(command, device)
        claimed = self._claimed(command)
        for host_block, device_block in pairs(command):
            assert 0 <= host_block < self.host_blocks
            assert host_block not in claimed
            if command.direction == "store":
                token = device[device_block]
                assert token == to_store[device_block], "stored too early"
                host[host_block] = TORN
            else:
                token = host[host_block]
                assert token != TORN
                device[device_block] = TORN
            copy.tokens.append(token)
        self.copies.append(copy)

    def end(self, copy: CopyUnderWay) -> None:
        self.copies.remove(copy)
        host = self.host[copy.command.stage]
        for (host_block, device_block), token in zip(pairs(copy.command), copy.tokens, strict=True):
            if copy.command.direction == "store":
                host[host_block] = token
            else:
                copy.device[device_block] = token

    def may_end(self) -> list[CopyUnderWay]:
        """The oldest copy of each stage and direction."""
        return [copy for copy in self.copies if self._lane(copy.command)[0] is copy]

    def touching(self, request: int) -> list[CopyUnderWay]:
        """Copies under way that carry a block of `request`."""
        return [copy for copy in self.copies if any(token[0] == request for token in copy.tokens)]

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


def pairs(command: StartCopy) -> list[tuple[int, int]]:
    """(host block, device block) of every block of a copy."""
    return [
        (run.host_block + i, run.device_block + i)
        for run in command.runs
        for i in range(run.length)
    ]
