"""KV that was taken from a request, until the daemon has confirmed that it is free."""

from dataclasses import dataclass

from pipemax.proto.messages.control import Release


@dataclass(slots=True)
class Releasing:
    """Of one name that the daemon knows requests by."""

    host_blocks: int
    device_blocks: list[int]
    """A copy may still touch these."""
    ready_after: int
    """Last step that uses them."""
    first_index: int = 0
    """Host blocks from this one on; others may still use those before it."""
    answers: int = 1
    """To come: one for each time that the daemon was told."""

    def add(self, more: "Releasing") -> None:
        """Take what is released later under the same name along; the daemon was told of `more`
        once, or will be told of both at once: `answers` is the caller's."""
        self.host_blocks += more.host_blocks
        self.device_blocks += more.device_blocks
        self.ready_after = max(self.ready_after, more.ready_after)
        self.first_index = min(self.first_index, more.first_index)


def release_of(epoch: int, entries: dict[int, Releasing]) -> Release:
    """What the daemon is told of them."""
    return Release(
        epoch=epoch,
        requests=tuple(entries),
        first_indices=tuple(entry.first_index for entry in entries.values()),
    )


def merge_into(entries: dict[int, Releasing], kv_key: int, entry: Releasing) -> None:
    """Adds `entry` to what the daemon will be told at once."""
    if kv_key in entries:
        entries[kv_key].add(entry)
    else:
        entries[kv_key] = entry
