"""A system's status as tables for a terminal."""

from collections.abc import Mapping
from typing import Protocol

from rich.console import Group, RenderableType
from rich.table import Table

from pipemax.proto.messages.ingest import Status
from pipemax.proto.rundir import run_dir_of
from pipemax.proto.sizes import format_size
from pipemax.proto.states import STATES


def status_view(name: str, status: Status, previous: Status | None = None) -> RenderableType:
    """What the system does now. With `previous`, rates and shares are those since then, else
    since the start."""
    samplers = ("", sampler_table(status, previous)) if status.samplers else ()
    return Group(_summary(name, status, previous), "", stage_table(status, previous), *samplers)


def stage_table(status: Status, previous: Status | None = None) -> Table:
    """Each stage's time by state in percent, since `previous` or since its start."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    # Fold: on a narrow terminal a heading takes two lines rather than lose its end.
    table.add_column("stage", overflow="fold")
    for heading in ("layers", "steps", *STATES):
        table.add_column(heading, justify="right", overflow="fold")
    before = {} if previous is None else {(s.stage, s.pid): s for s in previous.stages}
    on_gpus = any(stage.kv_copies for stage in status.stages)
    for heading in ("device", "activations by", "KV copied by") if on_gpus else ():
        table.add_column(heading, overflow="fold")
    for stage in status.stages:
        first, end = stage.layers
        shares = state_shares(stage, before.get((stage.stage, stage.pid)))
        table.add_row(
            f"stage-{stage.stage}",
            f"{first}–{end - 1}" if end > first else "–",
            str(stage.steps),
            *(f"{shares.get(state, 0.0):.1%}" for state in STATES),
            *((stage.device, stage.activation_transport, stage.kv_copies) if on_gpus else ()),
        )
    return table


def sampler_table(status: Status, previous: Status | None = None) -> Table:
    """Each sampler worker's rows and share of time spent sampling, as for stages."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("sampler", overflow="fold")
    for heading in ("rows", "sample"):
        table.add_column(heading, justify="right", overflow="fold")
    before = {} if previous is None else {(s.sampler, s.pid): s for s in previous.samplers}
    for sampler in status.samplers:
        shares = state_shares(sampler, before.get((sampler.sampler, sampler.pid)))
        table.add_row(
            f"sampler-{sampler.sampler}", str(sampler.rows), f"{shares.get('sample', 0.0):.1%}"
        )
    return table


class HasStates(Protocol):
    """A process that says what it spends its time on."""

    @property
    def state_seconds(self) -> dict[str, float]: ...


def state_shares(stage: HasStates, previous: HasStates | None = None) -> Mapping[str, float]:
    """Share of each state in the process's time since `previous`, else since its start. They sum to
    one, or are empty when no time has passed."""
    earlier = {} if previous is None else previous.state_seconds
    seconds = {
        state: value - earlier.get(state, 0.0) for state, value in stage.state_seconds.items()
    }
    total = sum(seconds.values())
    return {state: value / total for state, value in seconds.items()} if total > 0 else {}


def _summary(name: str, status: Status, previous: Status | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for heading, text in _lines(name, status, previous):
        table.add_row(heading, text)
    return table


def _lines(name: str, status: Status, previous: Status | None) -> list[tuple[str, str]]:
    waiting_for = f", waiting for {', '.join(status.missing)}" if status.missing else ""
    lines = [
        ("system", f"{name}: {status.phase}{waiting_for}, up {duration(status.uptime_s)}"),
        ("model", status.model_name),
        ("run directory", str(run_dir_of(name))),
        (
            "requests",
            f"{status.requests_running} running, {status.requests_waiting} waiting, "
            f"{status.requests_finished} finished, {status.preemptions} preempted",
        ),
        (
            "tokens",
            f"{status.prompt_tokens} in, {status.generation_tokens} out{_rates(status, previous)}",
        ),
        ("KV on devices", _blocks(status.device_blocks_used, status.device_blocks_total)),
        ("KV in host memory", _blocks(status.host_blocks_used, status.host_blocks_total)),
        ("KV host to device", _moved(status.load_bytes, status.load_seconds)),
        ("KV device to host", _moved(status.store_bytes, status.store_seconds)),
    ]
    if status.epoch > 1:
        lines.append(("recoveries", str(status.epoch - 1)))
    return lines


def _rates(status: Status, previous: Status | None) -> str:
    if previous is None or previous.instance_id != status.instance_id:
        return ""
    elapsed_s = status.uptime_s - previous.uptime_s
    if elapsed_s <= 0:
        return ""
    prompt = (status.prompt_tokens - previous.prompt_tokens) / elapsed_s
    output = (status.generation_tokens - previous.generation_tokens) / elapsed_s
    return f"; now {prompt:.0f} in/s, {output:.0f} out/s"


def _blocks(used: int, total: int) -> str:
    share = f" ({used / total:.0%})" if total else ""
    return f"{used} of {total} blocks{share}"


def _moved(size_bytes: int, seconds: float) -> str:
    rate = f", {format_size(size_bytes / seconds)}/s while copying" if seconds > 0 else ""
    return f"{format_size(size_bytes)}{rate}"


def duration(seconds: float) -> str:
    """In words, to the second."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
