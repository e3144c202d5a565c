"""Which sampler samples which row."""

from collections.abc import Iterable, Sequence

from pipemax.proto.messages.control import SampleRow
from pipemax.stage_worker.channels.logits import Shares, sampler_of


def share_out(sample: Sequence[SampleRow], rows: Iterable[int], num_samplers: int) -> Shares:
    """`rows` (indices in `sample`) by sampler, each sampler's in order.

    A request with rules has all its rows with one sampler, which keeps its state; the others, which
    have none, go one by one to whoever has least so far.
    """
    shares: list[list[int]] = [[] for _ in range(num_samplers)]
    free: list[int] = []
    for row in rows:
        extras = sample[row].extras
        if extras is not None and extras.request >= 0:
            shares[sampler_of(extras.request, num_samplers)].append(row)
        else:
            free.append(row)
    for row in free:
        min(shares, key=len).append(row)
    return tuple(tuple(sorted(share)) for share in shares)
