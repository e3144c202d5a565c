"""Which cores a stage keeps to (`--pin-cores`)."""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

log = logging.getLogger(__name__)

CpuPlace = tuple[int, int]
"""(socket, core in it); two CPUs of one core have the same."""


def pin_to_share(stage: int, num_stages: int, threads: int) -> None:
    """Keeps this thread, and those that it starts from now on, to the cores of `stage`. Where there
    is not one for each thread of each stage, all may run anywhere, as without."""
    usable = os.sched_getaffinity(0)
    share = share_of(places_of(usable), stage, num_stages, threads)
    if share is None:
        log.warning(
            "not pinned: %d stages of %d threads on %d cores", num_stages, threads, len(usable)
        )
        return
    os.sched_setaffinity(0, share)
    log.info("pinned to CPU %s", ", ".join(map(str, share)))


def share_of(
    places: Mapping[int, CpuPlace], stage: int, num_stages: int, threads: int
) -> tuple[int, ...] | None:
    """CPUs of one stage; None when they do not go round. The first hardware thread of every core
    is given out before any second one, and neighbours go to the same stage, on one socket."""
    if num_stages * threads > len(places):
        return None
    seen: dict[CpuPlace, int] = {}
    ranked = []
    for cpu in sorted(places):
        place = places[cpu]
        rank = seen.get(place, 0)
        seen[place] = rank + 1
        ranked.append((rank, place[0], cpu))
    ordered = [cpu for _, _, cpu in sorted(ranked)]
    return tuple(sorted(ordered[stage * threads : (stage + 1) * threads]))


def places_of(
    cpus: Iterable[int], sysfs: Path = Path("/sys/devices/system/cpu")
) -> dict[int, CpuPlace]:
    """As the kernel tells; a CPU that it says nothing of is taken for a core of its own."""
    return {cpu: _place_of(cpu, sysfs / f"cpu{cpu}" / "topology") for cpu in cpus}


def _place_of(cpu: int, topology: Path) -> CpuPlace:
    try:
        socket = int((topology / "physical_package_id").read_text())
        return socket, int((topology / "core_id").read_text())
    except (OSError, ValueError):
        return 0, -1 - cpu
