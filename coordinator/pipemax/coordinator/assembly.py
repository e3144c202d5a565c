"""Which processes are there, and when the system as a whole is ready.

Starting and recovering are one path: every process says Hello and reports ready; when all have,
one Reset with a new epoch goes to all; when all have answered, the scheduler resumes. A Hello from
a new incarnation at any time starts it over. Pure: events in, actions out.
"""

from dataclasses import dataclass, field

from pipemax.coordinator.events import Paused, Resumed
from pipemax.proto.messages.control import Hello, KvReady, Reset, SamplerReady, StageReady

DAEMON = "kv-daemon"


def stage_name(index: int) -> str:
    return f"stage-{index}"


def sampler_name(index: int) -> str:
    return f"sampler-{index}"


@dataclass(frozen=True, slots=True)
class ResetAll:
    """Send this to every stage and sampler and to the daemon."""

    message: Reset


Action = ResetAll | Paused | Resumed


@dataclass(slots=True)
class Peer:
    incarnation: str | None = None
    pid: int = 0
    ready: StageReady | SamplerReady | KvReady | None = None
    reset_epoch: int = 0


@dataclass(slots=True)
class Assembly:
    """`num_stages` stage workers, `num_samplers` sampler workers and one KV daemon."""

    num_stages: int
    num_samplers: int = 0
    epoch: int = 0
    running: bool = False
    peers: dict[str, Peer] = field(init=False)
    num_host_blocks: int = 0
    _stage_lost: bool = True
    _daemon_lost: bool = True

    def __post_init__(self) -> None:
        stages = [stage_name(i) for i in range(self.num_stages)]
        samplers = [sampler_name(i) for i in range(self.num_samplers)]
        self.peers = {name: Peer() for name in [*stages, *samplers, DAEMON]}

    @property
    def missing(self) -> tuple[str, ...]:
        """Processes the system waits for, each with what is missing."""
        late = []
        for name, peer in self.peers.items():
            if peer.incarnation is None:
                late.append(f"{name} (not started)")
            elif peer.ready is None:
                late.append(f"{name} (loading)")
            elif peer.reset_epoch != self.epoch:
                late.append(f"{name} (connecting)")
        return tuple(late)

    @property
    def stages(self) -> list[StageReady]:
        """What the stages reported, by index; only those that are ready."""
        found = (self.peers[stage_name(i)].ready for i in range(self.num_stages))
        return [ready for ready in found if isinstance(ready, StageReady)]

    def hello(self, name: str, message: Hello) -> list[Action]:
        """A process said Hello; the same incarnation may say it several times. A sampler that is
        lost takes nothing with it: what it knew of requests is sent again in every epoch."""
        peer = self.peers[name]
        if peer.incarnation == message.incarnation:
            return []
        self.peers[name] = Peer(message.incarnation, message.pid)
        if name == DAEMON:
            self._daemon_lost = True
        elif name in map(stage_name, range(self.num_stages)):
            self._stage_lost = True
        return self._stop()

    def ready(self, name: str, message: StageReady | SamplerReady | KvReady) -> list[Action]:
        self.peers[name].ready = message
        if any(peer.ready is None for peer in self.peers.values()):
            return []
        self.epoch += 1
        reset = Reset(epoch=self.epoch, keep_host_blocks=not self._daemon_lost)
        return [*self._stop(), ResetAll(reset)]

    def reset_done(self, name: str, epoch: int, num_host_blocks: int) -> list[Action]:
        """A process is ready for `epoch`; answers to an older Reset are ignored, and those of a
        process that said Hello anew and is not ready yet: its predecessor gave them."""
        if epoch != self.epoch or self.peers[name].ready is None:
            return []
        self.peers[name].reset_epoch = epoch
        if name == DAEMON:
            self.num_host_blocks = num_host_blocks
        if self.running or any(p.reset_epoch != self.epoch for p in self.peers.values()):
            return []
        self.running = True
        stages = self.stages
        resumed = Resumed(
            epoch,
            min(stage.num_blocks for stage in stages),
            self.num_host_blocks,
            [stage.block_bytes for stage in stages],
            device_kept=not self._stage_lost,
            host_kept=not self._daemon_lost,
            sweeps=[stage.sweep for stage in stages],
        )
        self._stage_lost = self._daemon_lost = False
        return [resumed]

    def _stop(self) -> list[Action]:
        was_running, self.running = self.running, False
        return [Paused()] if was_running else []
