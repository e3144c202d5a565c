"""The report of `pipemax bench throughput`, and who runs when."""

from dataclasses import replace
from typing import Any

import pytest

from pipemax.proto.errors import PipemaxSystemError
from pipemax.services.bench.engines import check_lengths, take_turns, warm_up_work
from pipemax.services.bench.outcome import Side, Throughput, ratio, report_data, report_lines
from pipemax.services.bench.work import BenchRequest, Work

WORK = (BenchRequest([1, 2, 3], 5), BenchRequest([4], 3))
OURS = Side("PipeMax 1", 2.5, (4.0, 2.0, 1.0), {"model": "m"})
PEER = Side("vLLM 2", 9.0, (4.0, 3.0, 2.0))


def test_the_first_line_is_that_of_vllm() -> None:
    assert report_lines(Throughput.of(WORK), OURS, None) == [
        "Throughput: 1.00 requests/s, 6.00 total tokens/s, 4.00 output tokens/s",
        "Total num prompt tokens:  4",
        "Total num output tokens:  8",
        "Start-up, not counted: 2.5 s",
        "Rounds: 4.00, 2.00, 1.00 s; the figures are of the median",
    ]


def test_a_single_round_lists_no_rounds() -> None:
    assert len(report_lines(Throughput.of(WORK), Side("x", 1.0, (2.0,)), None)) == 4


def test_the_peer_comes_with_a_ratio_and_its_spread() -> None:
    lines = report_lines(Throughput.of(WORK), OURS, PEER)
    assert lines[-3].endswith(
        "Throughput: 0.67 requests/s, 4.00 total tokens/s, 2.67 output tokens/s"
    )
    assert lines[-1] == "PipeMax over vLLM 2: 1.50 (median of 3 rounds; 1.00 to 2.00)"


def test_the_ratio_is_of_rounds_not_of_medians() -> None:
    ours, peer = Side("a", 0, (1.0, 10.0, 2.0)), Side("b", 0, (3.0, 10.0, 2.0))
    assert ratio(ours, peer).ratios == (3.0, 1.0, 1.0)
    assert ratio(ours, peer).median == 1.0


def test_json_has_the_keys_of_vllm_and_ours() -> None:
    data = report_data(Throughput.of(WORK), OURS, PEER)
    vllm = {
        "elapsed_time": 2.0,
        "num_requests": 2,
        "total_num_tokens": 12,
        "requests_per_second": 1.0,
        "tokens_per_second": 6.0,
    }
    ours = {
        "output_tokens_per_second": 4.0,
        "elapsed_times": [4.0, 2.0, 1.0],
        "start_up_seconds": 2.5,
        "engine": "PipeMax 1",
        "model": "m",
    }
    assert data.items() >= (vllm | ours).items()
    assert data["peer"]["elapsed_time"] == 3.0
    assert data["ratio_to_peer"] == {
        "median": 1.5,
        "least": 1.0,
        "most": 2.0,
        "rounds": [1.0, 1.5, 2.0],
    }
    assert "peer" not in report_data(Throughput.of(WORK), OURS, None)


class FakeEngine:
    start_up_s = 1.0

    def __init__(self, name: str, log: list[tuple[str, Work]]) -> None:
        self.name = name
        self.log = log

    @property
    def about(self) -> dict[str, Any]:
        return {"of": self.name}

    def run(self, work: Work) -> float:
        self.log.append((self.name, work))
        return float(len(self.log))

    def cpu_seconds(self) -> float:
        """As if it used a quarter of a core while the first one runs."""
        return sum(index / 4 for index, (name, _) in enumerate(self.log, 1) if name == "a")


def test_engines_warm_up_and_then_alternate_on_the_same_requests() -> None:
    log: list[tuple[str, Work]] = []
    other = (BenchRequest([9, 8], 6),)
    ours, peer = take_turns([FakeEngine("a", log), FakeEngine("b", log)], [WORK, other, WORK])
    assert [name for name, _ in log] == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [work for _, work in log[2:]] == [WORK, WORK, other, other, WORK, WORK]
    assert ours.seconds == (3.0, 6.0, 7.0)
    assert peer.seconds == (4.0, 5.0, 8.0)
    assert (ours.name, peer.about) == ("a", {"of": "b"})
    assert (ours.idle_cores, peer.idle_cores) == (0.0, 0.25)


def test_an_engine_that_works_while_another_is_timed_is_named() -> None:
    busy = replace(PEER, idle_cores=0.5)
    lines = report_lines(Throughput.of(WORK), OURS, busy)
    assert lines[-1] == "vLLM 2 used 0.50 cores while the other was timed, which is not fair"
    assert report_data(Throughput.of(WORK), OURS, busy)["peer"]["idle_cores"] == 0.5


def test_warm_up_is_short_and_its_prompts_are_in_no_round() -> None:
    work = tuple(BenchRequest([n, n + 1], 50) for n in range(20))
    warm = warm_up_work(work)
    assert len(warm) == 8
    assert {request.output_tokens for request in warm} == {4}
    prompts = [request.prompt_token_ids for request in work]
    assert not [request for request in warm if request.prompt_token_ids in prompts]


def test_a_wrong_length_is_no_result() -> None:
    check_lengths("x", [5, 3], WORK)
    with pytest.raises(PipemaxSystemError, match="x: request 1 has 4 output tokens, not the 3"):
        check_lengths("x", [5, 4], WORK)
