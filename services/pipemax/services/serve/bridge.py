"""Between the event loop, where HTTP requests live, and the system: one thread with one client."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipemax.client import ChoiceDelta, Client, Completion, Submit
from pipemax.proto.errors import NotRunningError, PipemaxError, RequestError
from pipemax.proto.messages.ingest import PositionLogprobs
from pipemax.services.serve.errors import ApiError

log = logging.getLogger(__name__)

_POLL_S = 0.5
"""At least so often the client looks whether the system is there."""
_CONNECT_AGAIN_S = 0.5
NOT_RUNNING = "not_running"


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    max_model_len: int
    since: int
    """Unix time of the connection."""


@dataclass(slots=True)
class _Gathered:
    """What one choice has got since it was last looked at: one piece, however many came."""

    token_ids: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None

    def add(self, delta: ChoiceDelta) -> None:
        self.token_ids += delta.token_ids
        self.text.append(delta.text)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *delta.logprobs]

    def taken(self, index: int) -> ChoiceDelta:
        return ChoiceDelta(
            index=index,
            token_ids=tuple(self.token_ids),
            text="".join(self.text),
            logprobs=None if self.logprobs is None else tuple(self.logprobs),
        )


class Ticket:
    """One request of the system, for the event loop. Whoever reads it slowly gets more at a time:
    it holds no more than the request's whole output."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self._gathered: dict[int, _Gathered] = {}
        self._completion: Completion | None = None
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self._completion is not None

    def add(self, news: ChoiceDelta | Completion) -> None:
        if isinstance(news, Completion):
            self._completion = news
        else:
            self._gathered.setdefault(news.index, _Gathered()).add(news)
        self._changed.set()

    async def begun(self) -> None:
        """Returns when there is something for `next`."""
        await self._changed.wait()

    @property
    def failure(self) -> Completion | None:
        """A completion that came before anything else and is none."""
        found = self._completion
        return None if found is None or found.error is None or self._gathered else found

    async def next(self) -> list[ChoiceDelta] | Completion:
        """What has come since; the completion last."""
        await self._changed.wait()
        self._changed.clear()
        if self._gathered:
            gathered, self._gathered = self._gathered, {}
            if self._completion is not None:
                self._changed.set()
            return [found.taken(index) for index, found in gathered.items()]
        assert self._completion is not None
        return self._completion

    async def completion(self) -> Completion:
        """Once it is there; for requests that do not stream."""
        while not isinstance(found := await self.next(), Completion):
            pass
        return found


class Bridge:
    """Its methods are for the event loop that it was made in."""

    def __init__(self, connect: Callable[[], Client]) -> None:
        """`connect` raises as `Client` when there is no system; it is tried again and again."""
        self._connect = connect
        self._loop = asyncio.get_running_loop()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._orders: deque[tuple[str, Ticket]] = deque()
        self._news: deque[tuple[Ticket, ChoiceDelta | Completion]] = deque()
        self._told = threading.Event()
        """The loop knows that there are news."""
        self._stopping = False
        self._model: ServedModel | None = None
        self._why = "the connection to the system is being made"
        self._thread = threading.Thread(target=self._run, name="bridge", daemon=True)
        self._tickets: dict[str, Ticket] = {}
        """The thread's."""

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """Cancels what is unfinished."""
        self._stopping = True
        self._wake()
        await asyncio.to_thread(self._thread.join)
        os.close(self._wake_fd)
        self._dispatch()

    @property
    def model(self) -> ServedModel:
        """What the system serves. Raises ApiError while there is none."""
        if self._model is None:
            raise ApiError(503, NOT_RUNNING, self._why)
        return self._model

    @property
    def is_connected(self) -> bool:
        return self._model is not None

    def submit(self, submit: Submit) -> Ticket:
        """Raises ApiError while there is no system."""
        self.model  # noqa: B018  (raises)
        ticket = Ticket(submit)
        self._orders.append(("submit", ticket))
        self._wake()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        if not ticket.is_done:
            self._orders.append(("cancel", ticket))
            self._wake()

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # In the loop, on the thread's behalf

    def _dispatch(self) -> None:
        self._told.clear()
        while self._news:
            ticket, news = self._news.popleft()
            ticket.add(news)

    # In the thread

    def _tell(self, ticket: Ticket, news: ChoiceDelta | Completion) -> None:
        self._news.append((ticket, news))
        if not self._told.is_set():
            self._told.set()
            self._loop.call_soon_threadsafe(self._dispatch)

    def _run(self) -> None:
        while not self._stopping:
            try:
                with self._connect() as client:
                    self._model = ServedModel(
                        client.model_name, client.max_model_len, int(time.time())
                    )
                    log.info("connected: %s", client.model_name)
                    self._serve(client)
            except PipemaxError as error:
                if self._model is not None or str(error) != self._why:
                    log.warning("%s", error)
                self._why = str(error)
            except Exception:
                log.exception("the connection to the system failed")
                self._why = "the connection to the system failed; see the log of pipemax serve"
            self._model = None
            self._fail_all()
            if not self._stopping:
                time.sleep(_CONNECT_AGAIN_S)

    def _serve(self, client: Client) -> None:
        while not self._stopping:
            client.wait(_POLL_S, self._wake_fd)
            self._drain_wakes()
            while self._orders:
                order, ticket = self._orders.popleft()
                if order == "submit":
                    self._submit(client, ticket)
                else:
                    client.cancel(ticket.submit.request_id)
            while (completion := client.poll(0.0)) is not None:
                ticket_done = self._tickets.pop(completion.request_id, None)
                if ticket_done is not None:
                    self._tell(ticket_done, completion)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _submit(self, client: Client, ticket: Ticket) -> None:
        submit = ticket.submit
        try:
            if submit.stream:
                client.submit(submit, lambda delta: self._tell(ticket, delta))
            else:
                client.submit(submit)
        except RequestError as error:
            refused = Completion.refused(submit.request_id, 0, error.code, str(error))
            self._tell(ticket, refused)
        except NotRunningError:
            self._tickets[submit.request_id] = ticket  # fails with the others
            raise
        else:
            self._tickets[submit.request_id] = ticket

    def _fail_all(self) -> None:
        """There is no system any more: what was unfinished, or came meanwhile, is refused."""
        while self._orders:
            order, ticket = self._orders.popleft()
            if order == "submit":
                self._tickets[ticket.submit.request_id] = ticket
        for ticket in self._tickets.values():
            refused = Completion.refused(ticket.submit.request_id, 0, NOT_RUNNING, self._why)
            self._tell(ticket, refused)
        self._tickets.clear()
