"""What goes wrong, where and when: `crash-stage:3@120`, `slow-link:2@60+30x0.25`."""

import re
from dataclasses import dataclass
from typing import Literal, cast, get_args

from pipemax.proto.errors import ConfigError

FaultKind = Literal["crash-stage", "crash-daemon", "slow-link", "slow-stage"]
_PATTERN = re.compile(
    r"(?P<kind>[a-z-]+)(?::(?P<stage>\d+))?@(?P<at>\d+(?:\.\d+)?)"
    r"(?:\+(?P<lasts>\d+(?:\.\d+)?))?(?:x(?P<factor>\d+(?:\.\d+)?))?"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A crashed process is started again after `lasts_s`. A slow link or stage works at `factor` of
    its speed for `lasts_s`."""

    kind: FaultKind
    stage: int
    """-1 for the daemon."""
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
    if (kind == "crash-daemon") != (match["stage"] is None):
        raise ConfigError(f"fault {text!r}: all kinds but crash-daemon need a stage")
    stage = int(match["stage"] or -1)
    if stage >= num_stages:
        raise ConfigError(f"fault {text!r}: there are stages 0 to {num_stages - 1}")
    slow = kind.startswith("slow")
    if slow != (match["factor"] is not None):
        raise ConfigError(
            f"fault {text!r}: slow-link and slow-stage need xFACTOR, crashes have none"
        )
    factor = float(match["factor"] or 1.0)
    if not 0.001 <= factor <= 1:
        raise ConfigError(f"fault {text!r}: the factor is a speed, from 0.001 to 1")
    lasts = float(match["lasts"] or (30.0 if slow else 5.0))
    return Fault(kind, stage, float(match["at"]), lasts, factor)
