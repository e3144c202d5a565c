"""The spool as a dataset of Ray's."""

import functools
from collections.abc import Sequence
from typing import Any

import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipemax.ray.spool import Extent, Spool, read_extent

_READERS = 1
"""Processes that read batches; one reads hundreds of MB in a second."""


class SpoolSource(Datasource):  # type: ignore[misc]  # Ray is not type-checked
    """A read task for each batch, on this machine."""

    def __init__(self, path: str, batches: Sequence[Extent]) -> None:
        super().__init__()
        self._path = path
        self._batches = batches

    def get_name(self) -> str:
        return "Lines"

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int:
        return sum(extent.size_bytes for extent in self._batches)

    def get_read_tasks(self, parallelism: int, *limits: Any, **more: Any) -> list[Any]:
        """As many as there are batches, whatever is asked: a batch is one block."""
        return [
            ReadTask(
                functools.partial(_read, self._path, extent),
                BlockMetadata(
                    num_rows=extent.rows,
                    size_bytes=extent.size_bytes,
                    input_files=None,
                    exec_stats=None,
                ),
            )
            for extent in self._batches
        ]


def _read(path: str, extent: Extent) -> list[Any]:
    return [read_extent(path, extent)]


def dataset(spool: Spool, rows: int) -> Any:
    """The spool's rows as a dataset whose blocks are batches."""
    batches = spool.batches(rows)
    return ray.data.read_datasource(
        SpoolSource(spool.path, batches),
        override_num_blocks=len(batches),
        num_cpus=0,  # replicas may hold all CPUs of this node,
        concurrency=_READERS,  # and Ray would otherwise start a process for each batch
    )
