"""How many replicas a cluster holds, and how much each is handed at a time. No Ray in here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipemax.proto.errors import ConfigError

_SHARES = 8
"""Batches each replica should get at least, so that the last ones end at about the same time."""
_MOST_BATCHES = 8192
"""Ray keeps a record of each for as long as the job runs."""
_LEAST_AT_ONCE = 2
_MOST_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Needs:
    """What one replica asks Ray for."""

    resource: str
    """`GPU` or `CPU`."""
    amount: int

    @property
    def remote_args(self) -> dict[str, int]:
        return {f"num_{self.resource.lower()}s": self.amount}


@dataclass(frozen=True, slots=True)
class Sizing:
    batch_rows: int
    at_once: int
    """Batches in a replica at a time."""


def needs_of(
    nodes: Sequence[Mapping[str, float]], *, device: str, stages: int, threads: int | None
) -> Needs:
    """`nodes`: the resources of each, as Ray counts them.

    A GPU for each stage. Without GPUs a replica takes as many CPUs as its stages have threads, or,
    if nobody said how many, the CPUs of a whole node: of the smallest one.

    Raises ConfigError when no node has them.
    """
    if device == "cuda":
        needs = Needs("GPU", stages)
    elif threads is not None:
        needs = Needs("CPU", stages * threads)
    else:
        whole = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
        needs = Needs("CPU", min(whole, default=1))
    if not replicas_in(nodes, needs):
        most = max((node.get(needs.resource, 0) for node in nodes), default=0)
        raise ConfigError(
            f"a replica needs {needs.amount} {needs.resource}s on one node, and the largest of "
            f"{len(nodes)} nodes has {most:g}; lower --pipeline-parallel-size"
            + ("" if needs.resource == "GPU" else " or --threads-per-stage")
        )
    return needs


def replicas_in(nodes: Sequence[Mapping[str, float]], needs: Needs) -> int:
    """So many have room at once."""
    return sum(int(node.get(needs.resource, 0) // needs.amount) for node in nodes)


def sizing(num_requests: int, replicas: int, capacity: int, asked: int | None) -> Sizing:
    """`capacity`: requests a replica runs at once, all micro-batches full. `asked`: rows of a
    batch, if the user said.

    A batch ends with its slowest request, and what it held stands idle towards its end. So several
    are in a replica at a time, twice its capacity between them: while some end, others fill the
    places. A batch is half a capacity, or less where that would leave some replicas without work at
    the end of a small job.
    """
    rows = asked
    if rows is None:
        rows = min(-(-capacity // 2), -(-num_requests // (replicas * _SHARES)))
        rows = max(1, rows, -(-num_requests // _MOST_BATCHES))
    at_once = -(-2 * capacity // rows)
    return Sizing(rows, min(max(at_once, _LEAST_AT_ONCE), _MOST_AT_ONCE))
