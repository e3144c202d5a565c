"""The client: prompts in, completions out, in order or as they finish."""

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from msgspec.structs import replace

from pipemax.client.completion import Completion
from pipemax.client.connection import Connection
from pipemax.client.prompts import Chat, Prompt, chat_list, one_per_prompt, prompt_list, submit_of
from pipemax.client.streams import OnDelta, StreamReader
from pipemax.proto.errors import NotRunningError, PipemaxSystemError, RequestError, WireError
from pipemax.proto.messages.ingest import (
    Cancel,
    ChatOptions,
    Finished,
    Partial,
    PartialTaken,
    Refused,
    SamplingParams,
    ServerHello,
    Status,
    StatusQuery,
    Submit,
)
from pipemax.proto.messages.types import Message

_MAX_ATTEMPTS = 4
"""A request that was unfinished at so many starts of the coordinator is given up."""
_LOW_LEVEL = 0
"""Owner of what `submit` submitted; each stream is an owner of its own."""
_PUMP_S = 1.0
_LEAST_S = 0.001
"""Left to a request whose time is over: the coordinator is to say so."""


@dataclass(slots=True)
class _Pending:
    submit: Submit
    owner: int
    index: int
    attempts: int = 1
    stream: StreamReader | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def again(self) -> Submit:
        """To be submitted once more: the time that it may take runs on."""
        timeout_s = self.submit.timeout_s
        if timeout_s is None:
            return self.submit
        left_s = timeout_s - (time.monotonic() - self.since)
        return replace(self.submit, timeout_s=max(left_s, _LEAST_S))


class Client:
    """A connection to a running system, found by `name`, or by the `endpoint` of its ingest socket.

    On another machine that is `tcp://HOST:PORT`, with the key folder `keys` that `pipemax keys add`
    made.
    `timeout_s` is how long nobody may answer before the system counts as gone. Requests that are
    unfinished when the coordinator starts anew are submitted again; each prompt gets exactly one
    completion. Not for use by several threads at once.

    Raises NotRunningError when there is no such system, also later, when it ends while there is
    something to wait for; WireError when its version does not fit ours.
    """

    def __init__(
        self,
        name: str = "default",
        *,
        endpoint: str | None = None,
        keys: Path | str | None = None,
        timeout_s: float = 30.0,
        label: str = "python",
    ) -> None:
        self._connection = Connection(
            name, endpoint, None if keys is None else Path(keys), timeout_s, label
        )
        self._timeout_s = timeout_s
        self._numbers = itertools.count()
        self._owners = itertools.count(_LOW_LEVEL + 1)
        self._pending: dict[str, _Pending] = {}
        self._abandoned: set[str] = set()
        """Cancelled requests of streams nobody reads any more; they hold credits until they end."""
        self._done: defaultdict[int, deque[Completion]] = defaultdict(deque)
        self._status: Status | None = None
        try:
            self._server: ServerHello = self._connection.open()
        except BaseException:
            self._connection.terminate()
            raise

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is unfinished and disconnects; safe to call twice."""
        try:
            self._abandon(list(self._pending))
        except PipemaxSystemError:
            pass  # nobody is left to tell
        finally:
            self._connection.terminate()

    @property
    def model_name(self) -> str:
        """Name under which the system serves its model."""
        return self._server.model_name

    @property
    def settings(self) -> str:
        """Stands for what results depend on: systems that say the same give the same results."""
        return self._server.settings

    @property
    def max_model_len(self) -> int:
        """Most tokens of one request, prompt and output together."""
        return self._server.max_model_len

    @property
    def free_credits(self) -> int:
        """Requests that may be submitted before another one must finish."""
        return max(0, self._server.credits - len(self._pending) - len(self._abandoned))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Completes all prompts; the completions come in the order of the prompts.

        `prompts` is one prompt or several; a list of integers is one prompt of token ids.
        `sampling_params` is one for all, or one per prompt; None is `SamplingParams()`. A prompt
        that cannot be served gives a completion whose `finish_reason` is `error`.
        """
        return _in_order(self.stream(prompts, sampling_params))

    def chat(
        self,
        conversations: Chat | Sequence[Chat],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: ChatOptions | None = None,
    ) -> list[Completion]:
        """As `generate`, for one chat or several, rendered with the model's chat template as
        `options` say."""
        chats = chat_list(conversations)
        params = one_per_prompt(sampling_params, len(chats))
        how = ChatOptions() if options is None else options
        return _in_order(
            self._run(
                Submit(request_id=self.new_request_id(), messages=chat, chat=how, sampling=sampling)
                for chat, sampling in zip(chats, params, strict=True)
            )
        )

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Completion]:
        """As `generate`, but each completion as soon as it is finished; `index` says which prompt
        it belongs to. Closing the iterator cancels what is unfinished."""
        several = prompt_list(prompts)
        params = one_per_prompt(sampling_params, len(several))
        return self._run(
            submit_of(self.new_request_id(), prompt, sampling)
            for prompt, sampling in zip(several, params, strict=True)
        )

    def new_request_id(self) -> str:
        """An id no other request of this client has. The same program gets the same ids in every
        run: a request without a seed is sampled with one made of the system's seed and its id."""
        return f"auto-{next(self._numbers)}"

    def submit(self, submit: Submit, on_delta: OnDelta | None = None) -> None:
        """Submits one request, whose completion `poll` will give. `on_delta`, with which its
        `stream` must be set, is called meanwhile, from within `poll`, with what it produces: with
        all of it before `poll` gives the completion.

        Raises RequestError for a request that is malformed, whose id is taken (`duplicate`), or
        when no credit is free (`credits`); it is then not submitted.
        """
        if submit.stream != (on_delta is not None):
            raise RequestError("stream", "`stream` and `on_delta` are given together or not at all")
        self._submit(submit, _LOW_LEVEL, 0)
        if on_delta is not None:
            self._pending[submit.request_id].stream = StreamReader(on_delta)

    def wait(self, timeout_s: float, or_readable: int) -> None:
        """Returns when there is something for `poll`, the file descriptor `or_readable` can be read
        or time is up. For who also waits for other things; call `poll` every second at least, as it
        also notices when the system is gone."""
        self._connection.wait(timeout_s, or_readable)

    def poll(self, timeout_s: float | None = None) -> Completion | None:
        """The next completion of what `submit` submitted; None when none came in time, or none is
        to come. `timeout_s` None waits for as long as the system lives."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        done = self._done[_LOW_LEVEL]
        while not done:
            left = _PUMP_S if deadline is None else deadline - time.monotonic()
            self._pump(max(0.0, min(left, _PUMP_S)))
            expected = any(p.owner == _LOW_LEVEL for p in self._pending.values())
            if not done and (left <= 0 or not expected):
                return None
        return done.popleft()

    def cancel(self, request_id: str) -> None:
        """Stops a request of `submit`; it still gets its completion, with what it has produced."""
        if request_id in self._pending:
            self._connection.send(Cancel(request_id=request_id))

    def status(self) -> Status:
        """What the system is doing now."""
        self._status = None
        self._connection.send(StatusQuery())
        deadline = time.monotonic() + self._timeout_s
        while self._status is None:
            if time.monotonic() > deadline:
                raise NotRunningError(f"no status came within {self._timeout_s:g} s")
            self._pump(_PUMP_S)
        return self._status

    def _run(self, submits: Iterable[Submit]) -> Iterator[Completion]:
        """Keeps as many requests submitted as there are credits, and yields what finishes."""
        owner = next(self._owners)
        done = self._done[owner]
        waiting = enumerate(submits)
        unfinished = 0
        more = True
        try:
            while more or unfinished:
                while more and self.free_credits:
                    index, submit = next(waiting, (0, None))
                    if submit is None:
                        more = False
                        continue
                    try:
                        self._submit(submit, owner, index)
                        unfinished += 1
                    except RequestError as error:
                        yield Completion.refused(submit.request_id, index, error.code, str(error))
                if more or unfinished:
                    self._pump(_PUMP_S)
                while done:
                    unfinished -= 1
                    yield done.popleft()
        finally:
            del self._done[owner]
            self._abandon([i for i, p in self._pending.items() if p.owner == owner])

    def _submit(self, submit: Submit, owner: int, index: int) -> None:
        if submit.request_id in self._pending or submit.request_id in self._abandoned:
            raise RequestError("duplicate", f"request {submit.request_id!r} is not finished yet")
        if not self.free_credits:
            raise RequestError(
                "credits",
                f"{self._server.credits} requests are unfinished, which is all this system allows "
                "a client; poll until one finishes",
            )
        self._connection.send_request(submit)
        self._pending[submit.request_id] = _Pending(submit, owner, index)

    def _abandon(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            del self._pending[request_id]
            self._abandoned.add(request_id)
            self._connection.send(Cancel(request_id=request_id))

    def _pump(self, timeout_s: float) -> None:
        """Waits for a message, then takes all that are there."""
        message = self._connection.receive(timeout_s)
        if self._connection.was_lost:
            self._greet_again(None)
        while message is not None:
            self._take(message)
            message = self._connection.receive(0.0)

    def _take(self, message: Message) -> None:
        match message:
            case Finished():
                pending = self._finish(message.request_id)
                if pending is not None:
                    completion = Completion.of(message, pending.index)
                    if pending.stream is not None:
                        completion = pending.stream.finish(completion)
                    self._done[pending.owner].append(completion)
            case Partial():
                self._take_partial(message)
            case Refused(request_id=None):
                self._greet_again(message)
            case Refused(request_id=str(request_id), code=code, message=reason):
                pending = self._finish(request_id)
                if pending is not None:
                    self._fail(pending, code, reason)
            case Status():
                self._status = message
                if message.instance_id != self._server.instance_id:
                    self._greet_again(None)
            case _:
                pass  # a second answer to a greeting sent twice

    def _take_partial(self, partial: Partial) -> None:
        for request in partial.requests:
            pending = self._pending.get(request.request_id)
            if pending is not None and pending.stream is not None:
                pending.stream.take(request.choices)
        self._connection.send(PartialTaken(number=partial.number))

    def _finish(self, request_id: str) -> _Pending | None:
        self._abandoned.discard(request_id)
        return self._pending.pop(request_id, None)

    def _fail(self, pending: _Pending, code: str, reason: str) -> None:
        self._done[pending.owner].append(
            Completion.refused(pending.submit.request_id, pending.index, code, reason)
        )

    def _greet_again(self, refused: Refused | None) -> None:
        """The coordinator does not know us: it is a new one, so what was unfinished is submitted
        again. If it is the old one after all, it refused something for another reason."""
        instance_id = self._server.instance_id
        self._server = self._connection.open()
        self._abandoned.clear()
        pending, self._pending = self._pending, {}
        for request_id, request in pending.items():
            request.attempts += self._server.instance_id != instance_id
            if request.attempts > _MAX_ATTEMPTS:
                self._fail(request, "failed", f"unfinished at {_MAX_ATTEMPTS} starts of the system")
            else:
                if request.stream is not None:
                    request.stream.start_again()
                self._connection.send_request(request.again)
                self._pending[request_id] = request
        if refused is not None and self._server.instance_id == instance_id:
            raise WireError(refused.code, f"the system refused a message: {refused.message}")


def _in_order(completions: Iterator[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: completion.index)
