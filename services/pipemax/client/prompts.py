"""What callers give a Client, one or several, as one submission each."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipemax.proto.messages.ingest import SamplingParams, Submit

Prompt = str | Sequence[int]
"""Text, or token ids."""
Chat = Sequence[Mapping[str, Any]]
"""Messages `{"role": …, "content": …}`."""


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt as a list of one. Raises TypeError for anything that is no prompt."""
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    if several and all(_is_int(item) for item in several):
        return [tuple(map(operator.index, several))]  # type: ignore[arg-type]
    for position, prompt in enumerate(several):
        if not isinstance(prompt, str) and not (
            isinstance(prompt, Iterable) and all(map(_is_int, prompt))
        ):
            raise TypeError(
                f"prompt {position} is a {type(prompt).__name__}; a prompt is a string or a "
                "sequence of token ids"
            )
    return several  # type: ignore[return-value]


def chat_list(conversations: Chat | Sequence[Chat]) -> list[tuple[dict[str, Any], ...]]:
    """One chat as a list of one."""
    chats: list[tuple[dict[str, Any], ...]] = []
    single: list[dict[str, Any]] = []
    for item in conversations:
        if isinstance(item, Mapping):
            single.append(dict(item))
        else:
            chats.append(tuple(dict(message) for message in item))
    if single and chats:
        raise TypeError("messages and lists of messages are mixed; give one chat or several")
    return [tuple(single)] if single else chats


def submit_of(request_id: str, prompt: Prompt, sampling: SamplingParams) -> Submit:
    if isinstance(prompt, str):
        return Submit(request_id=request_id, prompt=prompt, sampling=sampling)
    token_ids = tuple(map(operator.index, prompt))
    return Submit(request_id=request_id, prompt_token_ids=token_ids, sampling=sampling)


def one_per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Raises ValueError when there are several, but not one for each prompt."""
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts; give one for each")
    return list(params)


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
