"""The queue of those who wait: order of service, and what is kept of whom."""

from array import array
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from pipemax.coordinator.request import Request
from pipemax.coordinator.waiting import _SLACK, Newcomer, WaitingQueue
from pipemax.proto.messages.ingest import SamplingParams

SAMPLING = SamplingParams(max_tokens=7)


def newcomer(key: int, tokens: int = 3) -> Newcomer:
    return Newcomer(key, array("i", range(tokens)), SAMPLING, 5, 1.5, 2, ((8,),), "g")


def queue(*keys: int) -> WaitingQueue:
    made = WaitingQueue(max_model_len=8, eos_token_ids=frozenset({2}))
    for key in keys:
        made.put_last(newcomer(key, tokens=key))
    return made


def test_whose_turn_comes_is_the_request_that_was_sent() -> None:
    waiting = queue(4, 5)
    first = waiting.first()
    assert first is not None
    assert (first.key, list(first.tokens), first.sampling) == (4, [0, 1, 2, 3], SAMPLING)
    assert (first.seed, first.arrived_at, first.job) == (5, 1.5, 2)
    assert (first.bad_words, first.grammar) == (((8,),), "g")
    assert (first.ends_at, first.end_tokens) == (8, {2})  # the model allows no more
    assert waiting.first() is first
    assert waiting.remove(4) is first
    assert list(waiting) == [5]


def test_choices_of_one_request_do_not_grow_each_other() -> None:
    waiting = WaitingQueue(8, frozenset())
    prompt = array("i", [1, 2])
    for key in (1, 2):
        waiting.put_last(Newcomer(key, prompt, SAMPLING, 0, 0.0))
    one = waiting.remove(1)
    assert one is not None
    one.tokens.append(3)
    other = waiting.remove(2)
    assert other is not None
    assert list(other.tokens) == [1, 2]


def test_nobody_waits_in_an_empty_queue() -> None:
    waiting = queue()
    assert waiting.first() is None
    assert waiting.remove(1) is None
    assert not waiting
    assert list(waiting) == list(waiting.lengths()) == waiting.ran_before() == []


def test_who_ran_before_is_known_and_goes_first() -> None:
    waiting = queue(4, 5)
    waiting.first()
    returned = Request(9, [1] * 6, SAMPLING, 0, 0.0)
    returned.admitted_at = 1.0
    waiting.put_first(returned)
    assert list(waiting) == [9, 4, 5]
    assert list(waiting.lengths()) == [6, 4, 5]
    assert waiting.ran_before() == [returned]
    assert set(waiting.never_ran()) == {4, 5}


def test_what_is_taken_out_of_the_middle_is_not_kept_for_ever() -> None:
    """The first may wait for long, while others come and are cancelled."""
    waiting = queue(0)
    for key in range(1, 4 * _SLACK):
        waiting.put_last(newcomer(key))
        waiting.remove(key)
    assert len(waiting._order) <= _SLACK + 3
    assert list(waiting) == [0]


@given(st.lists(st.tuples(st.sampled_from(["put", "first", "back", "cancel"]), st.integers(0, 9))))
def test_it_is_an_ordered_dictionary(moves: list[tuple[str, int]]) -> None:
    waiting, model = queue(), OrderedDict[int, None]()
    admitted: list[Request] = []
    next_key = 0
    for move, number in moves:
        if move == "put":
            waiting.put_last(newcomer(next_key))
            model[next_key] = None
            next_key += 1
        elif move == "first" and model:
            first = waiting.first()
            assert first is not None
            assert waiting.remove(first.key) is first
            assert model.popitem(last=False)[0] == first.key
            admitted.append(first)
        elif move == "back" and admitted:
            request = admitted.pop()
            waiting.put_first(request)
            model[request.key] = None
            model.move_to_end(request.key, last=False)
        elif move == "cancel" and model:
            key = list(model)[number % len(model)]
            assert waiting.remove(key) is not None
            del model[key]
        assert list(waiting) == list(model)
        assert len(waiting) == len(model)
        assert all(key in waiting for key in model)
