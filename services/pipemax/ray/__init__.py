"""PipeMax on many boxes: a replica on each, fed by Ray Data (`pip install 'pipemax[ray]'`).

`Replica` is a class for `ray.data.Dataset.map_batches`; `pipemax run-batch --ray-address` is made
of it. Ray schedules, restarts and balances; a replica is one PipeMax system on one machine and
knows of no other. Nothing here is imported unless it is asked for, and Ray only by `run-batch`.
"""

from pipemax.ray.replica import Replica

__all__ = ["Replica"]
