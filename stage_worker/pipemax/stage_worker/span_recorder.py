"""A stage's spans, kept until they are sent. Exists only while somebody watches."""

from array import array
from typing import Final

from pipemax.proto.messages.spans import MAX_SPANS
from pipemax.proto.states import STATES, State

_CODE_OF: Final = {state: code for code, state in enumerate(STATES)}


class SpanRecorder:
    """Spans follow each other without gaps. Neighbours of one state and one step are one span.
    Holds `most` spans; further ones are left out until `take`, so that what is kept has no gaps."""

    def __init__(self, begin_ns: int, most: int = MAX_SPANS) -> None:
        self._most = most
        self._end_ns = begin_ns
        self._clear()

    def _clear(self) -> None:
        self._begin_ns = self._end_ns
        self._full = False
        self._states = bytearray()
        self._lengths_ns: array[int] = array("q")
        self._steps: array[int] = array("q")

    def add(self, state: State, step: int, length_ns: int) -> None:
        if length_ns <= 0:
            return
        self._end_ns += length_ns
        if self._full:
            return
        code = _CODE_OF[state]
        if self._states and self._states[-1] == code and self._steps[-1] == step:
            self._lengths_ns[-1] += length_ns
        elif len(self._states) < self._most:
            self._states.append(code)
            self._lengths_ns.append(length_ns)
            self._steps.append(step)
        else:
            self._full = True

    def take(self) -> tuple[int, bytes, "array[int]", "array[int]"]:
        """(begin_ns, states, lengths_ns, steps) of what is kept, which is then forgotten."""
        taken = (self._begin_ns, bytes(self._states), self._lengths_ns, self._steps)
        self._clear()
        return taken
