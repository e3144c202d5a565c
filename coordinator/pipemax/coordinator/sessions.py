"""Clients: what each may still send, what waits to be delivered, and what is wrong with a message.

A client has no session until it has an unfinished request, so that connections which say nothing
cost nothing here. Results that a client's socket cannot take yet wait in its session; there are
never more of them than the client has credits.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pipemax.coordinator.deadlines import Deadlines
from pipemax.coordinator.events import FinishRequest, Submitted
from pipemax.coordinator.streams import Output, Stream
from pipemax.coordinator.text.detokenizer import StopChecker
from pipemax.coordinator.text.limits import check_sampling
from pipemax.coordinator.text.logprobs import LogprobsTaken
from pipemax.coordinator.text.processor import TextProcessor
from pipemax.coordinator.text.structured import grammar_of
from pipemax.proto.config import EngineConfig
from pipemax.proto.errors import RequestError
from pipemax.proto.messages.control import NO_TOKEN, RowLogprobs
from pipemax.proto.messages.ingest import Finished, SamplingParams, Submit
from pipemax.proto.messages.types import Message

ClientId = bytes
_NOT_FOLLOWED = (
    "structured_outputs: the grammar grew too complex to be followed; give a simpler one, or one "
    "that leaves less open"
)
_TOOK_TOO_LONG = (
    "it was not finished within the time it was given (timeout_s, --request-timeout), and was "
    "cancelled"
)
_SEED_MASK = 2**64 - 1


@dataclass(slots=True)
class Session:
    client: ClientId
    job: int
    """Of its requests."""
    keys: dict[str, int] = field(default_factory=dict)
    """Unfinished requests: the client's id to ours."""
    outbox: deque[Message] = field(default_factory=deque)
    stream: Stream = field(default_factory=Stream)


@dataclass(slots=True)
class Entry:
    """One accepted request, from the client's side."""

    session: Session | None
    """None: it is a durable job's."""
    request_id: str
    key: int
    """Ours, of its first choice; the others' follow it."""
    num_prompt_tokens: int
    submitted_at: float
    prompt_text: str | None
    sampling: SamplingParams
    stream: bool
    choices: Sequence[Output] = ()
    """Empty until a first token is to be looked at, or the first choice is done: a hundred thousand
    requests may wait."""
    is_over_time: bool = False
    """Its choices are being cancelled for that."""


class Sessions:
    """Pure: sockets are the shell's. `send` may raise BlockingIOError when the client's queue is
    full and ConnectionError when the client is gone."""

    def __init__(
        self,
        config: EngineConfig,
        text: TextProcessor,
        send: Callable[[ClientId, Message], None],
    ) -> None:
        self._config = config
        self._text = text
        self._send = send
        self._sessions: dict[ClientId, Session] = {}
        self._entries: dict[int, Entry] = {}
        """By key of each choice."""
        self._no_logprobs = LogprobsTaken(text, SamplingParams(), NO_TOKEN)
        """Of all who want none: it holds nothing."""
        self.listening: set[int] = set()
        """Keys of choices that are to be told of every token, because somebody looks at their
        text, or streams, or wants logprobs."""
        self._with_outbox: set[ClientId] = set()
        self._with_changes: set[ClientId] = set()
        """Of streaming requests."""
        self._deadlines = Deadlines()
        self._next_key = 0
        self._last_sampling: SamplingParams | None = None
        """Most requests ask for what the one before did: they have it in common then."""
        self.undelivered = 0
        """Results whose client was gone."""

    @property
    def is_idle(self) -> bool:
        """Nothing is unfinished and nothing waits to be delivered."""
        return not self._sessions

    def accept(self, client: ClientId, submit: Submit, now: float) -> Submitted:
        """Check a request and remember whose it is. Raises RequestError."""
        session = self._sessions.get(client)
        if session is not None:
            if submit.request_id in session.keys:
                raise RequestError(
                    "duplicate_id", f"request id {submit.request_id!r} is still unfinished"
                )
            if len(session.keys) + len(session.outbox) >= self._config.client_credits:
                raise RequestError(
                    "no_credit",
                    f"more than {self._config.client_credits} unfinished requests; "
                    "wait for results before sending more",
                )
        else:
            session = Session(client, job_of(client))
        event = self._enter(session, submit, session.job, now)
        self._sessions[session.client] = session
        session.keys[submit.request_id] = event.key
        return event

    def accept_for_job(self, job: int, submit: Submit, now: float) -> Submitted:
        """The same for a request of the durable job of this number: `finish` returns its result,
        and there is nothing to deliver."""
        if submit.stream:
            raise RequestError("stream", "stream: results of jobs are fetched, not streamed")
        return self._enter(None, submit, -job, now)  # connections are positive numbers

    def _enter(self, session: Session | None, submit: Submit, job: int, now: float) -> Submitted:
        limit = self._config.max_model_len
        prompt = self._text.encode(submit, limit)
        sampling = check_sampling(
            submit.sampling,
            self._text.vocab_size,
            limit,
            len(prompt),
            has_tokenizer=self._text.has_tokenizer,
            eos_token_ids=self._text.eos_token_ids,
        )
        if sampling == self._last_sampling:
            sampling = self._last_sampling
        self._last_sampling = sampling
        self._check_computed(sampling)
        outputs = sampling.structured_outputs
        grammar = "" if outputs is None else grammar_of(outputs)
        bad_words = self._text.encode_bad_words(sampling.bad_words)
        key = self._next_key
        self._next_key += sampling.n
        prompt_text = self._text.prompt_text(submit, prompt) if submit.echo else None
        entry = Entry(
            session, submit.request_id, key, len(prompt), now, prompt_text, sampling, submit.stream
        )
        if submit.stream or sampling.stop or sampling.logprobs is not None:
            self.listening.update(range(key, key + sampling.n))
        if sampling.prompt_logprobs is not None or sampling.logprobs is not None:
            entry.choices = self._outputs_of(entry, first_token=prompt[0])
        for index in range(sampling.n):
            self._entries[key + index] = entry
        if submit.timeout_s is not None:
            self._deadlines.set(key, now + submit.timeout_s)
        seed = sampling.seed
        if seed is None:
            seed = derived_seed(self._config.seed, submit.request_id)
        return Submitted(key, prompt, sampling, seed & _SEED_MASK, job, bad_words, grammar)

    def _outputs_of(self, entry: Entry, first_token: int = NO_TOKEN) -> list[Output]:
        """For its choices; `first_token` of its prompt, where it wants logprobs."""
        decoder = self._text if self._text.has_tokenizer else None
        sampling = entry.sampling
        return [
            Output(
                StopChecker(decoder, sampling, stream=entry.stream),
                self._no_logprobs
                if first_token == NO_TOKEN
                else LogprobsTaken(self._text, sampling, first_token),
            )
            for _ in range(sampling.n)
        ]

    def _found(self, key: int) -> tuple[Entry, Output]:
        """A choice's request, and what came of the choice so far."""
        entry = self._entries[key]
        if not entry.choices:
            entry.choices = self._outputs_of(entry)
        return entry, entry.choices[key - entry.key]

    def _check_computed(self, sampling: SamplingParams) -> None:
        """Refuses what needs a model that really computes."""
        if self._config.device != "modelled":
            return
        for name in ("logprobs", "prompt_logprobs", "structured_outputs"):
            if getattr(sampling, name) is not None:
                raise RequestError(
                    "not_implemented",
                    f"{name}: a modelled device makes its tokens up, with no probabilities",
                )

    def key_of(self, client: ClientId, request_id: str) -> int | None:
        """Our number of a client's unfinished request."""
        session = self._sessions.get(client)
        return session.keys.get(request_id) if session else None

    def over_time(self, now: float) -> list[int]:
        """Keys of requests to cancel, because they have had their time; each once."""
        keys = self._deadlines.over(now)
        for key in keys:
            self._entries[key].is_over_time = True
        return keys

    def num_choices(self, key: int) -> int:
        """Of the request whose first choice has this key; 1 if it has finished."""
        found = self._entries.get(key)
        return found.sampling.n if found else 1

    def token(self, key: int, token_id: int, logprobs: RowLogprobs | None = None) -> str | None:
        """Take one sampled token of a choice that is `listening`; returns the stop string it
        completes, if any."""
        entry, output = self._found(key)
        output.logprobs.take(logprobs)
        if entry.stream and entry.session is not None:
            entry.session.stream.changed.setdefault(entry.key, entry)
            self._with_changes.add(entry.session.client)
        return output.text.append(token_id)

    def taken(self, client: ClientId, number: int) -> None:
        """The client is done with the Partials up to this one."""
        if (session := self._sessions.get(client)) is not None:
            session.stream.taken(number)

    def scored(self, key: int, logprobs: RowLogprobs | None) -> None:
        """Take the logprobs of the next prompt token."""
        self._found(key)[1].logprobs.take_prompt(logprobs)

    def finish(self, result: FinishRequest, now: float) -> tuple[int, Finished] | None:
        """One choice is done. With the last of a request comes its key, and the client's message,
        queued for delivery if it is a client's."""
        entry, output = self._found(result.key)
        output.result = result
        if result.key in self.listening:
            self.listening.discard(result.key)
        else:
            output.text.take_all(result.output_token_ids)
        results = [other.result for other in entry.choices if other.result is not None]
        if len(results) < len(entry.choices):
            return None
        for key in range(entry.key, entry.key + len(results)):
            del self._entries[key]
        self._deadlines.discard(entry.key)
        message = _finished(entry, results, now)
        session = entry.session
        if session is None:
            return entry.key, message
        del session.keys[entry.request_id]
        session.stream.changed.pop(entry.key, None)
        session.outbox.append(message)
        self._with_outbox.add(session.client)
        return entry.key, message

    def deliver(self) -> list[int]:
        """Send what waits. Returns the keys of unfinished requests whose client is gone."""
        orphans: list[int] = []
        for client in [*self._with_outbox, *(self._with_changes - self._with_outbox)]:
            session = self._sessions[client]
            try:
                self._deliver_to(client, session)
            except BlockingIOError:
                continue
            except ConnectionError:
                self.undelivered += len(session.outbox)
                session.outbox.clear()
                session.stream.changed.clear()
                orphans += session.keys.values()
            self._with_outbox.discard(client)
            if not session.stream.changed:
                self._with_changes.discard(client)
            if not session.keys:
                del self._sessions[client]
        return orphans

    def _deliver_to(self, client: ClientId, session: Session) -> None:
        while session.outbox:
            self._send(client, session.outbox[0])
            session.outbox.popleft()
        while (partial := session.stream.next()) is not None:
            self._send(client, partial)
            session.stream.sent(partial)


def _finished(entry: Entry, results: list[FinishRequest], now: float) -> Finished:
    """`results` of all choices."""
    first, *others = [output.choice for output in entry.choices]
    failure = _failure(entry, results)
    admitted = [r.admitted_at for r in results if r.admitted_at is not None]
    first_tokens = [r.first_token_at for r in results if r.first_token_at is not None]
    return Finished(
        request_id=entry.request_id,
        token_ids=first.token_ids,
        text=first.text,
        finish_reason=first.finish_reason if failure is None else "error",
        stop_reason=first.stop_reason,
        logprobs=first.logprobs,
        more_choices=tuple(others),
        prompt_logprobs=entry.choices[0].logprobs.prompt(),
        prompt_text=entry.prompt_text,
        num_prompt_tokens=entry.num_prompt_tokens,
        queue_s=min(admitted, default=now) - entry.submitted_at,
        first_token_s=min(first_tokens, default=now) - entry.submitted_at,
        total_s=now - entry.submitted_at,
        error=None if failure is None else failure[0],
        error_code=None if failure is None else failure[1],
    )


def _failure(entry: Entry, results: list[FinishRequest]) -> tuple[str, str | None] | None:
    """Why the request counts as failed, in words and as a code; None if it does not. One that came
    to its end in the very step in which its time was over does not."""
    reasons = {result.finish_reason for result in results}
    if entry.is_over_time and "abort" in reasons:
        return _TOOK_TOO_LONG, "timeout"
    return (_NOT_FOLLOWED, None) if results[0].finish_reason == "error" else None


def job_of(client: ClientId) -> int:
    """The job of a client's requests: one connection is one job, as a batch file is one. Depends on
    the connection's identity alone, so that a client which waits for each result before it sends
    the next request stays one job."""
    return int.from_bytes(client, "little")


def derived_seed(seed: int, request_id: str) -> int:
    """A seed for a request that brought none: of the system's seed and the request's id, so that
    neither the order of submission nor what else runs changes its tokens."""
    digest = hashlib.blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
