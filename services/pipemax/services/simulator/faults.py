"""What goes wrong, where and when: `crash-stage:3@120`, `slow-link:2@60+30x0.25`.

Processes talk over ZeroMQ on `ipc://`. Of a message's ways to go wrong, that leaves:

- *Lost.* Only together with its sender or its receiver: what lies in a dead process's queues is
  gone, and so is what is sent to it before its successor says Hello. Sockets also drop a message
  when ten thousand wait, which takes minutes of sleep and is not modelled. `crash-*` loses what is
  sent to the dead process, and `lost-message` also its own last words: for LAST_WORDS_S (see
  `injection`) nothing it sends arrives, except activations, which lie in shared memory; then it is
  dead.
- *Twice.* ZeroMQ does not repeat. The shells do, at every tick, until they are answered: Hello,
  AttachPool (and so PoolAttached); and after a reset the coordinator says Release again, which may
  then be answered in both epochs. `duplicate-message` repeats the first two at the worst moment,
  just before the answer comes; the last happens by itself after crashes. StageReady, KvReady,
  Reset, plans, Computed, Loaded and StepDone are said once to one receiver.
- *Late.* A process that is stopped or swapped out finds its messages when it wakes, in order, those
  of epochs that have ended among them: `late-message`. A step it was computing ends late as well.
- *Out of order.* Not on one connection. Messages of different senders have no order to begin with.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from pipemax.proto.errors import ConfigError

FaultKind = Literal[
    "crash-stage",
    "crash-daemon",
    "slow-link",
    "slow-stage",
    "lost-message",
    "late-message",
    "duplicate-message",
]
DAEMON_INDEX = -1
"""In the place of a stage."""
_STAGE_OR_DAEMON = ("lost-message", "late-message")
_LASTS_S = {"slow-link": 30.0, "slow-stage": 30.0}
_PATTERN = re.compile(
    r"(?P<kind>[a-z-]+)(?::(?P<stage>\d+))?@(?P<at>\d+(?:\.\d+)?)"
    r"(?:\+(?P<lasts>\d+(?:\.\d+)?))?(?:x(?P<factor>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A crashed process is started again after `lasts_s`. A slow link or stage works at `factor` of
    its speed, a late one sleeps, a repeating one repeats for `lasts_s`."""

    kind: FaultKind
    stage: int
    """DAEMON_INDEX for the daemon."""
    at_s: float
    lasts_s: float
    factor: float = 1.0


def parse_fault(text: str, num_stages: int) -> Fault:
    """KIND[:STAGE]@SECONDS[+LASTS][xFACTOR]. Raises ConfigError."""
    match = _PATTERN.fullmatch(text.strip())
    if match is None or match["kind"] not in get_args(FaultKind):
        raise ConfigError(
            f"fault {text!r} is not KIND[:STAGE]@SECONDS[+LASTS][xFACTOR] with KIND one of "
            f"{', '.join(get_args(FaultKind))}"
        )
    kind = cast(FaultKind, match["kind"])
    if kind not in _STAGE_OR_DAEMON and (kind == "crash-daemon") != (match["stage"] is None):
        raise ConfigError(
            f"fault {text!r}: crash-daemon has no stage, lost-message and late-message may have "
            "one (without, it is the daemon), all others need one"
        )
    stage = DAEMON_INDEX if match["stage"] is None else int(match["stage"])
    if stage >= num_stages:
        raise ConfigError(f"fault {text!r}: there are stages 0 to {num_stages - 1}")
    slow = kind.startswith("slow")
    if slow != (match["factor"] is not None):
        raise ConfigError(
            f"fault {text!r}: slow-link and slow-stage need xFACTOR, the others have none"
        )
    factor = float(match["factor"] or 1.0)
    if not 0.001 <= factor <= 1:
        raise ConfigError(f"fault {text!r}: the factor is a speed, from 0.001 to 1")
    lasts = float(match["lasts"] or _LASTS_S.get(kind, 5.0))
    return Fault(kind, stage, float(match["at"]), lasts, factor)
