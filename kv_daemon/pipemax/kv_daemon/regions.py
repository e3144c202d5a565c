"""When each stage's region of the host pool is made to be there, where, and who is told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipemax.kv_daemon import numa
from pipemax.kv_daemon.engine import CopyEngine
from pipemax.kv_daemon.pages import Cpus, PoolPages
from pipemax.proto.messages.kv import AskHostRegion, HostRegionHere


@dataclass(frozen=True, slots=True)
class GpuHost:
    """How the host pool serves stages on GPUs."""

    parts: tuple[tuple[int, int], ...]
    """[begin, end) of each stage's region, in bytes."""
    pci_bus_ids: tuple[str, ...] = ()
    """Of each stage's GPU, where the daemon knows it."""
    finish: Callable[[int, int], None] | None = None
    """See PoolPages."""
    context_bytes: Callable[[], tuple[int, ...]] = tuple
    """See KvReady."""


class RegionDesk:
    """Answers stages on GPUs that ask for their region.

    pages: a part for every stage.
    near: CPUs at a GPU, by its PCI bus id; None where the machine has one memory node.
    """

    def __init__(
        self, pages: PoolPages, engine: CopyEngine, near: Callable[[str], Cpus] | None
    ) -> None:
        self._pages = pages
        self._engine = engine
        self._near = near
        self._asking: set[int] = set()

    def begin(self, num_stages: int, pci_bus_ids: Sequence[str] = ()) -> None:
        """Starts on all regions, if it is known where they belong: where that matters and only the
        stages know their GPUs, it waits until they ask."""
        for stage in range(num_stages):
            if self._near is None:
                self._pages.touch(stage)
            elif pci_bus_ids:
                self._pages.touch(stage, self._near(pci_bus_ids[stage]))

    def ask(self, message: AskHostRegion) -> None:
        self._asking.add(message.stage)
        cpus = None if self._near is None else self._near(message.pci_bus_id)
        self._pages.touch(message.stage, cpus)

    def answers(self) -> list[tuple[int, HostRegionHere]]:
        """Stages that asked and can be answered by now."""
        ready = [
            stage
            for stage in sorted(self._asking)
            if self._engine.let_go(stage) and self._pages.is_there(stage)
        ]
        self._asking.difference_update(ready)
        return [(stage, HostRegionHere(region=self._engine.region(stage))) for stage in ready]


def nodes_near() -> Callable[[str], Cpus] | None:
    """What RegionDesk takes as `near` on this machine."""
    return numa.cpus_near if numa.num_nodes() > 1 else None
