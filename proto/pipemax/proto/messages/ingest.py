"""Clients and the coordinator (socket `ingest`)."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pipemax.proto.messages.sampling import Key, TokenId
from pipemax.proto.messages.sampling import SamplingParams as SamplingParams
from pipemax.proto.messages.sampling import StructuredOutputs as StructuredOutputs
from pipemax.proto.messages.status import JobProgress as JobProgress
from pipemax.proto.messages.status import SamplerStatus as SamplerStatus
from pipemax.proto.messages.status import SlotStatus as SlotStatus
from pipemax.proto.messages.status import StageStatus as StageStatus
from pipemax.proto.messages.status import Status as Status
from pipemax.proto.messages.status import StatusQuery as StatusQuery
from pipemax.proto.messages.types import Count, ErrorText, Message, Seconds, ShortText
from pipemax.proto.messages.types import JobName as JobName
from pipemax.proto.messages.types import JobState as JobState

RequestId = Annotated[str, Meta(min_length=1, max_length=256)]
FinishReason = Literal["stop", "length", "abort", "error"]
JobNote = Annotated[bytes, Meta(max_length=8192)]
CallNumber = Count
PromptIds = Annotated[tuple[TokenId, ...], Meta(max_length=2**21)]
PromptText = Annotated[str, Meta(max_length=2**24)]
Chat = Annotated[tuple[Annotated[dict[Key, Any], Meta(max_length=64)], ...], Meta(max_length=2**16)]


class ClientHello(Message, frozen=True, kw_only=True, tag="client_hello"):
    """First message of a client."""

    protocol: Count
    client: ShortText = ""


class ServerHello(Message, frozen=True, kw_only=True, tag="server_hello"):
    """Answer to ClientHello."""

    protocol: int
    instance_id: ShortText
    """Changes whenever the coordinator starts anew; requests of another instance are lost."""
    model_name: str
    max_model_len: Count
    credits: Count
    """Most unfinished requests this client may have."""
    settings: ShortText = ""
    """Stands for what results depend on: model, its name, dtype and seed."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a chat becomes a prompt. Names and meanings are vLLM's."""

    add_generation_prompt: bool = True
    """The prompt ends where the assistant's turn begins."""
    continue_final_message: bool = False
    """The prompt ends with the last message, which the output goes on with. Not together with
    `add_generation_prompt`."""
    chat_template_kwargs: Annotated[dict[Key, Any], Meta(max_length=64)] | None = None
    """Further variables of the model's chat template, `enable_thinking` for example."""


class Submit(Message, frozen=True, kw_only=True, tag="submit"):
    """One request. Exactly one of `prompt_token_ids`, `prompt` and `messages` is given."""

    request_id: RequestId
    """Chosen by the client; unique among its unfinished requests."""
    prompt_token_ids: PromptIds | None = None
    prompt: PromptText | None = None
    messages: Chat | None = None
    """A chat, rendered with the model's chat template."""
    chat: ChatOptions = ChatOptions()
    """Only with `messages`."""
    sampling: SamplingParams = SamplingParams()
    echo: bool = False
    """The result brings the prompt's text too."""
    timeout_s: Annotated[float, Meta(gt=0.0, le=1e8)] | None = None
    """How long it may take, from its acceptance; a job's, from when it was first taken up to run.
    Then it is cancelled: it finishes as an error with the code `timeout`, and with what it had
    produced."""
    stream: bool = False
    """What is produced is sent as Partial meanwhile. The result is the same, and whole."""


class Cancel(Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop a request; it finishes with reason `abort` and what it had produced."""

    request_id: RequestId


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One token at one position."""

    token_id: int
    text: str
    """Of this token alone; `token_id:5` when the model folder has no tokenizer."""
    logprob: float | None
    """None for a prompt's first token."""
    rank: Count
    """1 for the likeliest; 0 where there is no logprob."""


PositionLogprobs = tuple[TokenLogprob, ...]
"""The token that stands there, then the likeliest ones in order, it among them maybe."""


class Choice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of a request's outputs. Fields as in Finished."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[PositionLogprobs, ...] | None = None


class Finished(Message, frozen=True, kw_only=True, tag="finished"):
    """A request's result; sent once."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    text: str
    """Empty when the model folder has no tokenizer."""
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    """The stop token id or stop string met, None for end-of-sequence and length."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    """[len(token_ids)], if asked for."""
    more_choices: tuple[Choice, ...] = ()
    """Beyond the first, which is the message itself, if `n` asked for them."""
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    """[num_prompt_tokens], if asked for and the prompt was computed."""
    prompt_text: str | None = None
    """If asked for by `echo`: the prompt as it was given, or what its tokens read as."""
    num_prompt_tokens: Count
    queue_s: Seconds
    """From submission to admission."""
    first_token_s: Seconds
    """From submission to the first output token."""
    total_s: Seconds
    error: ErrorText | None = None
    """Why, when finish_reason is `error`."""
    error_code: ShortText | None = None
    """The same for programs: `timeout`; None where there is no word for it."""

    @property
    def num_output_tokens(self) -> int:
        """Of all choices."""
        return len(self.token_ids) + sum(len(choice.token_ids) for choice in self.more_choices)


class ChoiceDelta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one choice has got since the last Partial."""

    index: Count
    """Of the choice, from 0."""
    token_ids: tuple[int, ...]
    text: str
    """It follows the tokens late where more of them may change it, or it may turn out to be a stop
    string: what was sent stays, and is the front part of the result's text."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    """[len(token_ids)], if asked for."""


class RequestDelta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one request has got since the last Partial."""

    request_id: RequestId
    choices: tuple[ChoiceDelta, ...]


class Partial(Message, frozen=True, kw_only=True, tag="partial"):
    """What a client's requests with `stream` have produced and it was not told yet. A result comes
    whole, also what no Partial told of it.

    Two of these are sent ahead of the client's PartialTaken; while it takes none, what is produced
    is gathered for the next one."""

    number: Count
    """Counts a client's, from 1, while it has unfinished requests."""
    requests: tuple[RequestDelta, ...]


class PartialTaken(Message, frozen=True, kw_only=True, tag="partial_taken"):
    """The client is done with all Partials up to this one."""

    number: Count


class Refused(Message, frozen=True, kw_only=True, tag="refused"):
    """A request that was not accepted, or a message that could not be read (`request_id` None)."""

    request_id: ShortText | None
    code: ShortText
    message: ErrorText


class JobInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job and how far it is."""

    name: JobName
    state: JobState
    """`open` may get more requests, `running` is closed and has unfinished ones, `held` was opened
    for another model than the one that is served now, and waits for its own."""
    about: JobNote
    """As the client that opened it gave it."""
    model_name: str
    """Under which the model was served when the job was opened."""
    created_at: Seconds
    """Unix time."""
    ended_at: Seconds | None
    """Unix time of the last result, or of cancelling; None before."""
    num_requests: Count
    """Accepted so far: the next one has this `seq`."""
    num_results: Count
    """Requests with a result; their positions are those below this number."""
    num_failed: Count
    """Of these, errors and refusals."""
    prompt_tokens: Count
    output_tokens: Count


class JobRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of a job."""

    note: JobNote = b""
    """Comes back with the result."""
    request: Submit | Refused
    """A Submit is run. A Refused is taken for its own result, for what was to be a request and
    turned out to be none, so that it has its place among the results. Ids need not be unique."""


class JobResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one request of a job."""

    seq: Count
    note: JobNote
    finished_at: Seconds
    """Unix time."""
    result: Finished | Refused


class OpenJob(Message, frozen=True, kw_only=True, tag="open_job"):
    """Makes a job, or finds the one that was opened with the same `name` and `about`.

    Jobs are kept on disk and go on when the coordinator, or the whole system, is started again.
    Every message about jobs may be sent again when no answer comes: doing it twice is doing it
    once."""

    number: CallNumber
    """Chosen by the client; the answer carries it."""
    job: JobName
    about: JobNote = b""


class AddRequests(Message, frozen=True, kw_only=True, tag="add_requests"):
    """More requests for an open job; answered when they are kept."""

    number: CallNumber
    job: JobName
    first_seq: Count
    """Of the first one; the others follow. Those that the job has already are passed over, a gap
    is refused."""
    requests: Annotated[tuple[JobRequest, ...], Meta(max_length=1024)]


class CloseJob(Message, frozen=True, kw_only=True, tag="close_job"):
    """The job has all its requests, and on the disk when this is answered."""

    number: CallNumber
    job: JobName
    num_requests: Count


class ListJobs(Message, frozen=True, kw_only=True, tag="list_jobs"):
    """Asks about one job, or about all, oldest first."""

    number: CallNumber
    job: JobName | None = None


class FetchResults(Message, frozen=True, kw_only=True, tag="fetch_results"):
    """Asks for a job's results from a position on. They have positions in the order in which they
    were finished, keep them, and may be fetched again until the job is deleted."""

    number: CallNumber
    job: JobName
    position: Count


class CancelJob(Message, frozen=True, kw_only=True, tag="cancel_job"):
    """The job's unfinished requests are given up and get no results; what has one keeps it."""

    number: CallNumber
    job: JobName


class DeleteJob(Message, frozen=True, kw_only=True, tag="delete_job"):
    """Forgets a job, finished or cancelled, and its results. There may be none of that name."""

    number: CallNumber
    job: JobName


class RetryJob(Message, frozen=True, kw_only=True, tag="retry_job"):
    """Makes another job of the requests of a job, finished or cancelled, that failed: some at a
    time. To be said until the answer, about that other job, no longer has it `open`; then all are
    moved. Results of the first job stay as they are."""

    number: CallNumber
    job: JobName
    retry: JobName
    """Of the other one."""


class JobList(Message, frozen=True, kw_only=True, tag="job_list"):
    """Answer to all messages about jobs but FetchResults: the job as it is now, or all."""

    number: CallNumber
    jobs: tuple[JobInfo, ...]


class JobResults(Message, frozen=True, kw_only=True, tag="job_results"):
    """Answer to FetchResults: the next results, as many as fit in a message."""

    number: CallNumber
    job: JobInfo
    position: Count
    """Of the first one."""
    results: tuple[JobResult, ...]
    """None: there are no more now. There will be none at all if the job is finished or
    cancelled."""


class JobRefused(Message, frozen=True, kw_only=True, tag="job_refused"):
    """A message about jobs could not be carried out, and changed nothing."""

    number: CallNumber
    code: ShortText
    """`unknown_job`, `other_job` (the name is taken), `too_many_jobs`, `journal_full`, `journal`
    (cannot be written now), `damaged` (a result is not readable), `gap`, `closed`, `unfinished`,
    `nothing_failed`, `draining`."""
    message: ErrorText
