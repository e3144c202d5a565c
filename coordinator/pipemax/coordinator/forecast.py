"""How large the running requests will be when they finish, by the lengths of those that have."""

from collections.abc import Iterable

from pipemax.coordinator.request import Request
from pipemax.proto.geometry import blocks_for


class Forecast:
    """Output lengths are expected to be the mean of those seen, but at most `max_tokens`, and at
    least what is there already. Before any request has finished, the largest possible."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._total = 0
        self._count = 0
        self._mean: int | None = None
        self._blocks: dict[int, int] = {}
        self.total_blocks = 0
        """Blocks that all requests added will hold in the end."""

    def final_blocks(self, request: Request) -> int:
        """Blocks expected of the request when it finishes."""
        outputs = request.max_tokens
        if self._mean is not None:
            outputs = max(min(outputs, self._mean), request.num_outputs)
        return blocks_for(request.num_prompt + outputs, self._block_size)

    def add(self, request: Request) -> None:
        self._set(request.key, self.final_blocks(request))

    def remove(self, request: Request) -> None:
        self.total_blocks -= self._blocks.pop(request.key)

    def grown(self, request: Request) -> None:
        """The request has one more output token."""
        if self._mean is not None and request.num_outputs > self._mean:
            self.add(request)

    def finished(self, num_outputs: int, running: Iterable[Request]) -> None:
        """Learn a length. The mean is a whole number, so that it rarely moves the others."""
        self._total += num_outputs
        self._count += 1
        mean = -(-self._total // self._count)
        if mean != self._mean:
            self._mean = mean
            for request in running:
                self.add(request)

    def _set(self, key: int, blocks: int) -> None:
        self.total_blocks += blocks - self._blocks.get(key, 0)
        self._blocks[key] = blocks
