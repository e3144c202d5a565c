"""How the tokens of a request are picked: part of a Submit."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Tokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
AllowedIds = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=65536)]
NumLogprobs = Annotated[int, Meta(ge=0, le=20)]
Bias = Annotated[float, Meta(ge=-100.0, le=100.0)]
Key = Annotated[str, Meta(max_length=256)]
"""Of an object whose values are the client's own."""


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the output must be, to its end. Names and meanings are vLLM's; one is given."""

    json: (
        Annotated[dict[Key, Any], Meta(max_length=4096)]
        | Annotated[str, Meta(max_length=65536)]
        | None
    ) = None
    """A JSON schema."""
    json_object: bool = False
    """Any JSON object."""
    regex: Annotated[str, Meta(min_length=1, max_length=65536)] | None = None
    choice: (
        Annotated[
            tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...],
            Meta(min_length=1, max_length=1024),
        ]
        | None
    ) = None
    grammar: Annotated[str, Meta(min_length=1, max_length=65536)] | None = None
    """In Lark's notation, from its rule `start`."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to pick tokens and when to stop. Names and meanings are vLLM's."""

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy."""
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] = 0
    """Keep the k likeliest tokens; 0 and -1 keep all."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least this."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    """Drop tokens less likely than this share of the likeliest one's probability."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    """Same seed, same prompt, same parameters: same tokens, whatever runs beside it."""
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...], Meta(max_length=64)
    ] = ()
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=1024)] = ()
    min_tokens: Tokens = 0
    """End-of-sequence and stop tokens cannot be picked before this many output tokens, and stop
    strings are not looked for."""
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = 16
    """None: up to the model's length limit."""
    presence_penalty: Penalty = 0.0
    """Taken once from the logit of every token in the output."""
    frequency_penalty: Penalty = 0.0
    """Taken from a token's logit as often as the token is in the output."""
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    """Divides positive logits of tokens in prompt or output, and multiplies negative ones."""
    logit_bias: Annotated[dict[TokenId, Bias], Meta(max_length=4096)] | None = None
    """Added to the logits of these tokens, before the penalties."""
    allowed_token_ids: AllowedIds | None = None
    """No other token is picked."""
    bad_words: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=1024)], ...], Meta(max_length=1024)
    ] = ()
    """The token that would complete one of these in the output is not picked. Each is looked for
    as the tokenizer writes it at the begin of a text, and behind a space if that is as long."""
    structured_outputs: StructuredOutputs | None = None
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    """Outputs for the prompt. The i-th, from 0, is what a request with `seed` + i would give."""
    logprobs: NumLogprobs | None = None
    """Log probabilities of each output token, and of so many likeliest ones: the log-softmax of the
    logits as the model gives them."""
    prompt_logprobs: NumLogprobs | None = None
    """As `logprobs`, of each prompt token but the first."""
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
