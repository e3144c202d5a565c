"""`pipemax simulate` as a user meets it."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipemax.proto.errors import ConfigError
from pipemax.services.cli import app
from pipemax.services.simulator.command import SimulateFlags, build_spec
from pipemax.services.simulator.gantt import COLOURS, MEANINGS
from pipemax.services.simulator.records import STAGE_STATES

QUICK = (
    "simulate", "--gpu", "rtx-3090", "--model", "qwen2_5-32b", "--count", "4",
    "--requests", "30", "--workload", "600,30", "--sigma", "0.4", "--max-num-batched-tokens", "512",
)  # fmt: skip


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*QUICK, *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def test_the_table_shows_both_runs_and_the_gain() -> None:
    text = run("--compare")
    assert "qwen2_5-32b on 4 × rtx-3090, 30 requests, 600,30" in text
    assert "with offloading" in text
    assert "without offloading" in text
    assert "30 of 30" in text
    assert "first column over this one" in text


def test_json_holds_what_the_table_rounds() -> None:
    [with_it, without] = json.loads(run("--compare", "--json"))
    assert with_it["num_requests"] == without["num_requests"] == 30
    assert without["host_bytes"] == without["num_host_blocks"] == 0
    for figures in (with_it, without):
        assert len(figures["stages"]) == 4
        for stage in figures["stages"]:
            total = sum(stage["state_seconds"].values())
            assert total == pytest.approx(figures["elapsed_time"], abs=1e-6)
    assert json.loads(run("--json")) == [with_it]


def test_the_picture_holds_every_stage_and_only_states_that_were(tmp_path: Path) -> None:
    path = tmp_path / "run.svg"
    run("--svg", str(path), "--fault", "slow-stage:2@5+1x0.5")
    root = ET.parse(path).getroot()
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert [f"stage {index}" in texts for index in range(4)] == [True] * 4
    assert MEANINGS["compute"] in texts
    assert MEANINGS["wait_activation"] in texts
    assert MEANINGS["down"] not in texts
    drawn = {element.get("fill") for element in root.iter() if element.tag.endswith("rect")}
    assert {COLOURS["compute"], COLOURS["wait_activation"]} <= drawn
    assert set(COLOURS) == set(MEANINGS) == set(STAGE_STATES)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--gpu", "x"), "'x' is not known"),
        (("--bits", "3/16"), "--bits '3/16' is not two of"),
        (("--window", "1,2"), "give --svg FILE"),
        (("--svg", "x", "--window", "2,1"), "the first time must be before"),
        (("--svg", "x", "--window", "2"), "is not two times"),
        (("--compare", "--kv-offloading-size", "0"), "--compare needs offloading on"),
        (("--layer-split", "a"), "--layer-split 'a' is not numbers"),
        (("--against", "orca"), "--against 'orca' is not one of"),
        (("--all-reduce-gb-s", "0", "--against", "vllm-tp"), "--all-reduce-gb-s 0 is not a rate"),
        (("--host-memory-gb-s", "-1"), "--host-memory-gb-s -1 is not a rate"),
        (("--horizon", "-1"), "is not a time above 0"),
        (("--policy", "magic"), "magic"),
        (("--link-jitter", "3"), "not between 0 and 0.5"),
        (("--svg", "/no/such/folder/x.svg"), "cannot write /no/such"),
    ],
)
def test_what_cannot_work_is_said(arguments: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError) as found:
        CliRunner().invoke(app, [*QUICK, *arguments], catch_exceptions=False)
    assert text in str(found.value)


def test_fewer_bits_leave_more_room() -> None:
    plain = build_spec(SimulateFlags(gpu="l20", count=8, model="llama-2-70b", requests=10))
    small = build_spec(
        SimulateFlags(gpu="l20", count=8, model="llama-2-70b", requests=10, bits="8/8")
    )
    assert small.block_bytes[0] * 2 == plain.block_bytes[0]
    assert small.num_device_blocks > 2 * plain.num_device_blocks


def test_peers_stand_beside_the_run_and_are_called_models() -> None:
    text = run("--against", "vllm-pp,seesaw", "--against", "td-pipe")
    words = " ".join(text.split())
    assert "they are no measurements" in words
    for name in ("vLLM-PP", "Seesaw", "TD-Pipe"):
        assert f"model of {name}"[:9] in words
        assert name in words
    assert "vLLM-TP" not in words
    ours, peer = json.loads(run("--against", "vllm-tp", "--all-reduce-gb-s", "5", "--json"))
    assert (ours["system"], ours["is_model_of_peer"]) == ("pipemax", False)
    assert (peer["system"], peer["is_model_of_peer"]) == ("model of vLLM-TP", True)
    assert peer["num_requests"] == 30
    _, faster = json.loads(run("--against", "vllm-tp", "--json"))
    assert faster["elapsed_time"] < peer["elapsed_time"]


def test_layers_may_be_split_by_hand() -> None:
    [figures] = json.loads(run("--layer-split", "18,16,16,14", "--json"))
    assert [stage["layers"] for stage in figures["stages"]] == [18, 16, 16, 14]


def test_prompts_can_be_computed_in_phases_of_their_own() -> None:
    [mixed], [phased] = (json.loads(run("--json", "--prefill", how)) for how in ("mixed", "phases"))
    assert (mixed["prefill"], phased["prefill"]) == ("mixed", "phases")
    assert mixed["num_requests"] == phased["num_requests"] == 30
    assert mixed["elapsed_time"] != phased["elapsed_time"]


def test_an_unknown_way_to_prefill_is_refused() -> None:
    with pytest.raises(ConfigError, match="--prefill both: choose mixed or phases"):
        run("--prefill", "both")
