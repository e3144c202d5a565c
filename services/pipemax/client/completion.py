"""What becomes of a request."""

from dataclasses import dataclass

from pipemax.proto.messages.ingest import Choice, Finished, FinishReason, PositionLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A request's result. One that could not be served has `finish_reason` `error`, says why in
    `error`, and keeps no other request from running."""

    request_id: str
    index: int = 0
    """Position of the prompt in the call that submitted it; 0 for `Client.submit`."""
    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: FinishReason
    """`stop` (end-of-sequence, stop token or stop string), `length`, `abort` (cancelled) or
    `error`."""
    stop_reason: int | str | None = None
    """The stop token id or stop string met."""
    logprobs: tuple[PositionLogprobs, ...] | None = None
    """Of each output token, if asked for: the token's own, then those of the likeliest."""
    more_choices: tuple[Choice, ...] = ()
    """If `n` asked for several: those beyond the first, which is this completion itself."""
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None
    """Of each prompt token; the first has none."""
    prompt_text: str | None = None
    """If asked for by `Submit.echo`."""
    num_prompt_tokens: int = 0
    queue_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0
    error: str | None = None
    error_code: str | None = None
    """Short and stable: the code of the refusal; `timeout` for a request that was cancelled as it
    had had its time, with what it had produced; `failed` for any other that was accepted and could
    not be finished."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All of them."""
        first = Choice(
            token_ids=self.token_ids,
            text=self.text,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=self.logprobs,
        )
        return (first, *self.more_choices)

    @property
    def num_output_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @classmethod
    def of(cls, finished: Finished, index: int) -> "Completion":
        failed = finished.finish_reason == "error"
        return cls(
            request_id=finished.request_id,
            index=index,
            token_ids=finished.token_ids,
            text=finished.text,
            finish_reason=finished.finish_reason,
            stop_reason=finished.stop_reason,
            logprobs=finished.logprobs,
            more_choices=finished.more_choices,
            prompt_logprobs=finished.prompt_logprobs,
            prompt_text=finished.prompt_text,
            num_prompt_tokens=finished.num_prompt_tokens,
            queue_s=finished.queue_s,
            first_token_s=finished.first_token_s,
            total_s=finished.total_s,
            error=(finished.error or "failed without a reason") if failed else None,
            error_code=(finished.error_code or "failed") if failed else None,
        )

    @classmethod
    def refused(cls, request_id: str, index: int, code: str, message: str) -> "Completion":
        return cls(
            request_id=request_id,
            index=index,
            finish_reason="error",
            error=message,
            error_code=code,
        )
