"""Context hashes and made-up tokens."""

import random
from typing import Any

import numpy as np
import pytest

from pipemax.proto.messages.control import SampleRow
from pipemax.stage_worker.modelled.marks import (
    continuation,
    layers_mark,
    made_up_tokens,
    positions_in,
    scramble,
    words,
)

VOCAB_SIZE = 97


def row(**changes: Any) -> SampleRow:
    values: dict[str, Any] = {
        "item": 0,
        "seed": 5,
        "position": 2,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "banned_token_ids": (),
    }
    return SampleRow(**{**values, **changes})


def token(value: int, **changes: Any) -> int:
    hashes = np.array([value], np.uint64)
    (found,) = made_up_tokens(hashes, [row(**changes)], VOCAB_SIZE)
    assert hashes[0] == value, "the caller's hashes were changed"
    return found


def test_scramble_is_splitmix64() -> None:
    """The generator's published first outputs for seed 1234567, whose state grows by the same
    constant that `scramble` adds."""
    gamma, state = 0x9E3779B97F4A7C15, 1234567
    states = np.array([(state + n * gamma) % 2**64 for n in range(3)], np.uint64)
    assert scramble(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_words_hold_token_and_position() -> None:
    ids = np.array([0, 1, 2**31 - 1], np.int32)
    positions = np.array([0, 131_071, 2**31], np.int64)
    found = words(ids, positions)
    assert positions_in(found).tolist() == positions.tolist()
    assert (found & np.uint64(2**32 - 1)).tolist() == ids.tolist()


def test_the_output_depends_on_every_token_before_it_and_on_their_order() -> None:
    draw = random.Random(1)
    prompt = [draw.randrange(50_000) for _ in range(40)]
    plain = continuation(prompt, 12, 2**20)
    assert continuation(prompt + plain[:5], 7, 2**20) == plain[5:]
    for index in (0, 17, 39):
        changed = prompt.copy()
        changed[index] += 1
        assert continuation(changed, 12, 2**20) != plain
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    assert continuation(swapped, 12, 2**20) != plain


def test_tokens_are_spread_over_the_vocabulary() -> None:
    counts = np.bincount([token(value) for value in range(4000)], minlength=VOCAB_SIZE)
    assert len(counts) == VOCAB_SIZE
    assert counts.min() > 0
    assert counts.max() < 3 * 4000 / VOCAB_SIZE


def test_greedy_ignores_seed_and_position_and_drawing_does_not() -> None:
    values = range(100)
    greedy = [token(value) for value in values]
    assert [token(value, seed=6, position=3) for value in values] == greedy
    drawn = [token(value, temperature=0.7) for value in values]
    assert drawn != greedy
    assert [token(value, temperature=0.7) for value in values] == drawn
    assert [token(value, temperature=0.7, seed=6) for value in values] != drawn
    assert [token(value, temperature=0.7, position=3) for value in values] != drawn
    assert [token(value, temperature=1.3, top_k=1, top_p=0.1) for value in values] == drawn


def test_rows_of_one_step_do_not_change_each_other() -> None:
    rows = [row(), row(temperature=1.0), row(banned_token_ids=(token(2),)), row()]
    found = made_up_tokens(np.array([0, 1, 2, 3], np.uint64), rows, VOCAB_SIZE)
    assert found == [
        token(0),
        token(1, temperature=1.0),
        token(2, banned_token_ids=(token(2),)),
        token(3),
    ]


def test_banned_tokens_are_not_picked() -> None:
    banned = tuple({token(value) for value in range(60)})
    for value in range(60):
        assert token(value, banned_token_ids=banned) not in banned
    assert token(0, banned_token_ids=tuple(range(VOCAB_SIZE))) == token(0)


@pytest.mark.parametrize("other", [(0, 5), (5, 10), (4, 5)])
def test_stages_have_marks_of_their_own(other: tuple[int, int]) -> None:
    assert layers_mark((0, 10)) != layers_mark(other)
