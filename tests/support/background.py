"""Something that runs beside a test."""

import threading
from collections.abc import Callable


class Background(threading.Thread):
    """Runs a function beside the test and hands its outcome back."""

    def __init__(self, function: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._outcome: object = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._function()
        except BaseException as error:
            self._error = error

    def outcome(self) -> object:
        self.join()
        if self._error is not None:
            raise self._error
        return self._outcome
