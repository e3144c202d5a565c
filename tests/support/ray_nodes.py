"""A Ray cluster of several nodes on this machine, each with a CPU of its own count.

The cluster is started by a process of its own, which removes nodes as it is told: Ray's library
and what it starts stay out of the test's process.
"""

import os
import subprocess
import sys
from types import TracebackType

_OBJECT_STORE_BYTES = 100 * 2**20

_CLUSTER = f"""
import sys
from ray.cluster_utils import Cluster

num_nodes = int(sys.argv[1])
size = dict(num_cpus=1, object_store_memory={_OBJECT_STORE_BYTES})
cluster = Cluster(initialize_head=True, head_node_args=dict(include_dashboard=False, **size))
nodes = [cluster.add_node(**size) for _ in range(num_nodes - 1)]
print(cluster.address, flush=True)
for line in sys.stdin:
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    print("removed", flush=True)
cluster.shutdown()
"""


class RayNodes:
    """Context manager; the first node is the head, which cannot be removed."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes

    def __enter__(self) -> "RayNodes":
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER, str(self._num_nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        )
        self.address = self._answer()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()  # the end of its input

    def remove_one(self) -> None:
        """As if its machine were gone; returns once its processes have been killed."""
        assert self._process.stdin is not None
        self._process.stdin.write("remove\n")
        self._process.stdin.flush()
        assert self._answer() == "removed"

    def _answer(self) -> str:
        """Its next line that is one of ours; Ray prints, too."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word = line.strip()
            if word == "removed" or (":" in word and " " not in word):
                return word
        raise AssertionError("the cluster did not start")
