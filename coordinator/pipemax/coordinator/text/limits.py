"""What a request's sampling parameters must satisfy, given its prompt and the model."""

import msgspec

from pipemax.proto.errors import RequestError
from pipemax.proto.messages.ingest import SamplingParams

MAX_OUTPUT_TOKENS = 2**20
"""Of one request, its `n` choices together: a result is one message of at most 16 MiB."""
MAX_LOGPROBS = 2**17
"""Of one request: a result is one message, and these may take 100 bytes each of its 16 MiB."""


def check_sampling(
    params: SamplingParams,
    vocab_size: int,
    max_model_len: int,
    prompt_len: int,
    *,
    has_tokenizer: bool = True,
    eos_token_ids: frozenset[int] = frozenset(),
) -> SamplingParams:
    """`params` with `max_tokens` filled in: given, or all that is left of `max_model_len`.

    Ranges of single fields are the message schema's business; here is what depends on the prompt,
    on the model or on two fields at once. Raises RequestError with code `too_long` or
    `invalid_sampling`.
    """
    check_prompt_length(prompt_len, max_model_len)
    left = max_model_len - prompt_len
    max_tokens = left if params.max_tokens is None else params.max_tokens
    if max_tokens > left:
        raise RequestError(
            "too_long",
            f"prompt of {prompt_len} tokens plus max_tokens {max_tokens} is "
            f"{prompt_len + max_tokens}, more than max_model_len {max_model_len}; "
            f"set max_tokens to at most {left} or shorten the prompt",
        )
    if params.min_tokens > max_tokens:
        raise _invalid(
            f"min_tokens {params.min_tokens} is more than the {max_tokens} tokens the request may "
            "produce"
        )
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        wrong = [i for i in getattr(params, name) or () if not 0 <= i < vocab_size]
        if wrong:
            raise _invalid(f"{name}: {wrong[0]} is not in the vocabulary (0 to {vocab_size - 1})")
    _check_allowed(params, eos_token_ids)
    if params.structured_outputs is not None:
        _check_structured(params, eos_token_ids, has_tokenizer)
    if params.n * max_tokens > MAX_OUTPUT_TOKENS:
        raise _invalid(
            f"n {params.n} times {max_tokens} output tokens is more than {MAX_OUTPUT_TOKENS}; "
            "lower n or max_tokens"
        )
    _check_logprobs(params, prompt_len, max_tokens)
    if params.bad_words and not has_tokenizer:
        raise RequestError(
            "no_tokenizer",
            "bad_words need a tokenizer, and the model folder has no tokenizer.json; "
            "use logit_bias",
        )
    if params.stop and not has_tokenizer:
        raise RequestError(
            "no_tokenizer",
            "stop strings need a tokenizer, and the model folder has no tokenizer.json; "
            "use stop_token_ids",
        )
    return msgspec.structs.replace(params, max_tokens=max_tokens)


def _check_allowed(params: SamplingParams, eos_token_ids: frozenset[int]) -> None:
    """Something must be left to pick before `min_tokens` as well."""
    if params.allowed_token_ids is None or not params.min_tokens:
        return
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_token_ids)
    if ends.issuperset(params.allowed_token_ids):
        raise _invalid(
            f"allowed_token_ids holds nothing but tokens that end the output, and min_tokens "
            f"{params.min_tokens} forbids these at first"
        )


def _check_structured(
    params: SamplingParams, eos_token_ids: frozenset[int], has_tokenizer: bool
) -> None:
    for name in ("min_tokens", "ignore_eos", "allowed_token_ids"):
        if getattr(params, name):
            raise _invalid(f"{name} does not go with structured_outputs, which say where to end")
    if not has_tokenizer or not eos_token_ids:
        raise RequestError(
            "no_tokenizer",
            "structured_outputs need a tokenizer.json in the model folder, and the model an "
            "end-of-sequence token",
        )


def _check_logprobs(params: SamplingParams, prompt_len: int, max_tokens: int) -> None:
    """They travel to the client in one message."""
    max_tokens *= params.n
    outputs = 0 if params.logprobs is None else (params.logprobs + 1) * max_tokens
    prompt = 0 if params.prompt_logprobs is None else (params.prompt_logprobs + 1) * prompt_len
    if outputs + prompt > MAX_LOGPROBS:
        raise _invalid(
            f"logprobs and prompt_logprobs: {outputs} for {max_tokens} output tokens and {prompt} "
            f"for {prompt_len} prompt tokens are more than {MAX_LOGPROBS}; ask for fewer, or lower "
            "max_tokens"
        )


def check_prompt_length(prompt_len: int, max_model_len: int) -> None:
    """Raises RequestError unless the prompt leaves room for one output token."""
    if prompt_len < 1:
        raise RequestError("empty_prompt", "the prompt has no tokens; give at least one")
    if prompt_len + 1 > max_model_len:
        raise RequestError(
            "too_long",
            f"prompt of {prompt_len} tokens plus one output token is more than max_model_len "
            f"{max_model_len}; shorten the prompt or start with a larger --max-model-len",
        )


def _invalid(message: str) -> RequestError:
    return RequestError("invalid_sampling", message)
