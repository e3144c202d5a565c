"""What a benchmark asks for: prompts as token ids and exact output lengths, from three sources."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipemax.proto.errors import ConfigError
from pipemax.services.simulator.workload import Lengths, lognormal

SHORTEST_TOKENS = 4
LONGEST_PROMPT_TOKENS = 1024
LONGEST_TOKENS = 2048
"""Bounds on conversations: those outside are left out, as vLLM's benchmarks do."""
_FIRST_TOKEN_ID = 300
"""Prompts are made of ids from here on, where the vocabulary has room: special tokens and single
bytes come first."""


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request, which ends after exactly `output_tokens`."""

    prompt_token_ids: list[int]
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.output_tokens


Work = tuple[BenchRequest, ...]
"""All requests of a round, submitted at once, in this order."""


@dataclass(frozen=True, slots=True)
class LognormalData:
    """Lengths are the same in every round, tokens are not: no round finds prompts of another in a
    prefix cache."""

    lengths: tuple[Lengths, ...]
    vocab_size: int
    seed: int

    repeats = False

    def round(self, number: int) -> Work:
        draw = random.Random(f"tokens {self.seed} {number}")
        ids = range(min(_FIRST_TOKEN_ID, self.vocab_size // 2), self.vocab_size)
        return tuple(
            BenchRequest(draw.choices(ids, k=lengths.prompt_tokens), lengths.output_tokens)
            for lengths in self.lengths
        )


@dataclass(frozen=True, slots=True)
class FixedData:
    """The same requests in every round."""

    work: Work

    repeats = True

    def round(self, number: int) -> Work:
        return self.work


Data = LognormalData | FixedData


def lognormal_data(
    num_prompts: int,
    input_len: float,
    output_len: float,
    sigma: float,
    *,
    vocab_size: int,
    seed: int,
) -> LognormalData:
    """Prompt and output lengths from two independent lognormals with these means, whose logarithms
    have the standard deviation `sigma`. Raises ConfigError for values that make no sense."""
    drawn = lognormal("lognormal", input_len, output_len, num_prompts, seed, sigma)
    return LognormalData(drawn.requests, vocab_size, seed)


def sharegpt_data(
    path: Path, num_prompts: int, tokenizer: Path, *, output_len: int | None, seed: int
) -> FixedData:
    """The first two turns of `num_prompts` conversations, drawn with `seed`: the first is the
    prompt, the second says how long the output is, unless `output_len` does.

    `path`: a JSON list of `{"conversations": [{"value": …}, …]}`. Conversations with fewer than
    SHORTEST_TOKENS on a side, or more than LONGEST_PROMPT_TOKENS or LONGEST_TOKENS in all, are left
    out. Raises ConfigError for a file that is not such, or has too few that are left.
    """
    pairs = _first_turns(path)
    random.Random(seed).shuffle(pairs)
    encode = _open_tokenizer(tokenizer).encode
    work: list[BenchRequest] = []
    for prompt, answer in pairs:
        ids = encode(prompt).ids
        count = len(encode(answer, add_special_tokens=False).ids)
        count = count if output_len is None else output_len
        if SHORTEST_TOKENS <= len(
            ids
        ) <= LONGEST_PROMPT_TOKENS and SHORTEST_TOKENS <= count <= LONGEST_TOKENS - len(ids):
            work.append(BenchRequest(ids, count))
        if len(work) == num_prompts:
            return FixedData(tuple(work))
    raise ConfigError(
        f"{path} holds {len(work)} conversations of a length that fits, {num_prompts} are asked "
        "for; lower --num-prompts"
    )


def jsonl_data(path: Path, num_prompts: int | None, vocab_size: int) -> FixedData:
    """The first `num_prompts` lines, or all: objects with `prompt_token_ids` and `output_tokens`.
    Raises ConfigError naming the line that is not such, and where there are too few."""
    work: list[BenchRequest] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(work) == num_prompts:
                    break
                if line.strip():
                    work.append(_request(f"{path}:{number}", line, vocab_size))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not work or (num_prompts is not None and len(work) < num_prompts):
        raise ConfigError(
            f"{path} holds {len(work)} requests, {num_prompts or 'at least one'} are asked for"
        )
    return FixedData(tuple(work))


def _request(where: str, line: str, vocab_size: int) -> BenchRequest:
    try:
        record = json.loads(line)
        ids, count = record["prompt_token_ids"], record["output_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{where}: each line holds an object with prompt_token_ids and output_tokens"
        ) from error
    if not isinstance(ids, list) or not ids or not all(_is_id(one, vocab_size) for one in ids):
        raise ConfigError(
            f"{where}: prompt_token_ids is a list of at least one token id below {vocab_size}"
        )
    if type(count) is not int or count < 1:
        raise ConfigError(f"{where}: output_tokens is {count!r}, not a whole number of at least 1")
    return BenchRequest(ids, count)


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size


def _first_turns(path: Path) -> list[tuple[str, str]]:
    try:
        conversations = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(conversations, list):
        raise ConfigError(f"{path} is not a list of conversations, as ShareGPT's files are")
    found = []
    for index, conversation in enumerate(conversations):
        try:
            turns = conversation["conversations"]
            if len(turns) >= 2:
                found.append((str(turns[0]["value"]), str(turns[1]["value"])))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: entry {index} is not an object with `conversations`, a list of turns "
                "with a `value` each"
            ) from error
    return found


def _open_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise ConfigError(f"{path} is missing: conversations are text, which needs a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ConfigError(f"{path} cannot be read: {error}") from error


def prompt_tokens(work: Sequence[BenchRequest]) -> int:
    return sum(len(request.prompt_token_ids) for request in work)


def output_tokens(work: Sequence[BenchRequest]) -> int:
    return sum(request.output_tokens for request in work)
