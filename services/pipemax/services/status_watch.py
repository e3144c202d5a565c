"""The pipeline at a glance, for a terminal that shows it again and again.

Each stage is a bar: its time of the last seconds, by state. States have colours, and a letter each,
which is what tells them apart where there are no colours or somebody does not see them.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipemax.proto.messages.ingest import JobProgress, StageStatus, Status
from pipemax.proto.states import STATES
from pipemax.services.bottleneck import bottleneck
from pipemax.services.status_view import duration, state_shares

WINDOW_S = 10.0
"""What bars and rates are of."""
LETTERS: Mapping[str, str] = {
    "compute": "C",
    "wait_plan": "P",
    "wait_activation": "A",
    "wait_kv": "K",
    "prepare": "R",
    "send": "S",
}
COLOURS: Mapping[str, tuple[str, str]] = {
    "compute": ("#0072B2", "#FFFFFF"),
    "wait_plan": ("#BBBBBB", "#000000"),
    "wait_activation": ("#E69F00", "#000000"),
    "wait_kv": ("#D55E00", "#000000"),
    "prepare": ("#CC79A7", "#000000"),
    "send": ("#56B4E9", "#000000"),
}
"""Of the bar and of its letters. The bars' are those of Okabe and Ito."""
_USED, _FREE = ("#009E73", "#000000"), ("#444444", "#FFFFFF")
_LEAST_BAR = 12
_LEAST_SHOWN = 0.005
"""A cause below this share is not named."""
MOST_JOBS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Of a bar."""

    share: float
    letter: str
    colours: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of letters as wide as there is room, split as `parts` say."""

    parts: Sequence[Part]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_LEAST_BAR, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = cells([part.share for part in self.parts], options.max_width)
        for part, width in zip(self.parts, widths, strict=True):
            back, ink = part.colours
            yield Segment(part.letter * width, Style(color=ink, bgcolor=back))
        if not any(widths):
            yield Segment(" " * options.max_width)


def cells(shares: Sequence[float], width: int) -> list[int]:
    """`width` cells by largest remainder; none where all shares are 0."""
    total = sum(shares)
    if total <= 0:
        return [0] * len(shares)
    exact = [share / total * width for share in shares]
    found = [int(one) for one in exact]
    rest = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for index in rest[: width - sum(found)]:
        found[index] += 1
    return found


class Watch:
    """Remembers what the system said in the last seconds."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: deque[Status] = deque()

    def look(self, status: Status) -> RenderableType:
        """The picture with `status` as its newest part."""
        if self._seen and self._seen[-1].instance_id != status.instance_id:
            self._seen.clear()
        self._seen.append(status)
        while len(self._seen) > 2 and self._seen[1].uptime_s <= status.uptime_s - WINDOW_S:
            self._seen.popleft()
        return Group(
            self._title(status),
            "",
            self._stages(status),
            _legend(),
            self._held_up(status),
            "",
            self._work(status),
            *([_jobs(status.jobs)] if status.jobs else ()),
        )

    @property
    def _span_s(self) -> float:
        return self._seen[-1].uptime_s - self._seen[0].uptime_s

    def _title(self, status: Status) -> Text:
        missing = f", waiting for {', '.join(status.missing)}" if status.missing else ""
        return Text.assemble(
            (self._name, "bold"),
            f": {status.phase}{missing}, up {duration(status.uptime_s)} · {status.model_name}",
        )

    def _stages(self, status: Status) -> Table:
        table = Table(box=None, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
        table.header_style = "bold"
        span = f"last {self._span_s:.0f} s" if self._span_s >= 1 else "since the start"
        table.add_column("stage", no_wrap=True)
        table.add_column(span, ratio=1)
        table.add_column("compute", justify="right", no_wrap=True)
        table.add_column("most lost to", no_wrap=True)
        for stage in status.stages:
            shares = state_shares(stage, self._before(stage))
            parts = [Part(shares.get(s, 0.0), LETTERS[s], COLOURS[s]) for s in STATES]
            table.add_row(
                str(stage.stage),
                Bar(parts),
                f"{shares.get('compute', 0.0):.0%}" if shares else "–",
                _largest_bubble(shares),
            )
        return table

    def _before(self, stage: StageStatus) -> StageStatus | None:
        """The stage at the begin of the window, or since its process was started."""
        for status in list(self._seen)[:-1]:
            for before in status.stages:
                if (before.stage, before.pid) == (stage.stage, stage.pid):
                    return before
        return None

    def _held_up(self, status: Status) -> Text:
        found = bottleneck(self._seen[0], status)
        if found is None:
            return Text("no place holds the others up")
        return Text.assemble(
            "the others wait for ", (found.where, "bold"), f": {found.state} {found.share:.0%}"
        )

    def _work(self, status: Status) -> Table:
        table = Table.grid(padding=(0, 1, 0, 0), expand=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(ratio=1)
        table.add_column(overflow="fold")
        tiers = (
            ("KV, devices", status.device_blocks_used, status.device_blocks_total),
            ("KV, host", status.host_blocks_used, status.host_blocks_total),
        )
        for heading, used, total in tiers:
            parts = (Part(used, "#", _USED), Part(total - used, ".", _FREE))
            table.add_row(heading, Bar(parts), f"{used} of {total} blocks")
        lines = Table.grid(padding=(0, 1, 0, 0))
        lines.add_column(style="bold", no_wrap=True)
        lines.add_column(overflow="fold")
        lines.add_row(
            "requests",
            f"{status.requests_running} running, {status.requests_waiting} waiting, "
            f"{status.requests_finished} finished",
        )
        lines.add_row("tokens", self._rates(status))
        if status.samplers:
            lines.add_row("samplers", ", ".join(self._samplers(status)))
        lines.add_row("slots", "requests/context: " + "  ".join(_slots(status)))
        grid = Table.grid(expand=True)
        grid.add_column(ratio=1)
        grid.add_row(table)
        grid.add_row(lines)
        return grid

    def _samplers(self, status: Status) -> Iterator[str]:
        before = {(s.sampler, s.pid): s for s in self._seen[0].samplers}
        for sampler in status.samplers:
            shares = state_shares(sampler, before.get((sampler.sampler, sampler.pid)))
            yield f"{sampler.sampler} busy {shares.get('sample', 0.0):.0%}"

    def _rates(self, status: Status) -> str:
        first, span_s = self._seen[0], self._span_s
        if span_s <= 0:
            return f"{status.prompt_tokens} in, {status.generation_tokens} out"
        prompt = (status.prompt_tokens - first.prompt_tokens) / span_s
        output = (status.generation_tokens - first.generation_tokens) / span_s
        return f"{output:,.0f} out per second, {prompt:,.0f} in"


def _slots(status: Status) -> Iterator[str]:
    """Requests of its step, and the context they read."""
    for slot in status.slots:
        yield f"{slot.requests}/{_short(slot.context_tokens)}"


def _jobs(jobs: Sequence[JobProgress]) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    # Whoever cannot tell two long names apart by their beginnings has `pipemax jobs`.
    table.add_column(style="bold", no_wrap=True, overflow="ellipsis", max_width=20)
    table.add_column(ratio=1)
    table.add_column(overflow="fold")
    for job in jobs[:MOST_JOBS]:
        left = job.num_requests - job.num_results
        bar = Bar((Part(job.num_results, "#", _USED), Part(left, ".", _FREE)))
        table.add_row(f"job {job.name}", bar, _job_line(job))
    if len(jobs) > MOST_JOBS:
        table.add_row("", "", f"and {len(jobs) - MOST_JOBS} more jobs")
    return table


def _job_line(job: JobProgress) -> str:
    errors = f", {job.num_failed} errors" if job.num_failed else ""
    left = f", {duration(job.eta_s)} left" if job.eta_s is not None else ""
    state = "" if job.state == "running" else f", {job.state}"
    return f"{job.num_results} of {job.num_requests}{errors}{left}{state}"


def _largest_bubble(shares: Mapping[str, float]) -> str:
    lost = {state: share for state, share in shares.items() if state != "compute"}
    state = max(lost, key=lambda s: lost[s], default=None)
    if state is None or lost[state] < _LEAST_SHOWN:
        return ""
    return f"{state} {lost[state]:.0%}"


def _legend() -> Text:
    legend = Text()
    for state in STATES:
        back, ink = COLOURS[state]
        legend.append("  " if legend else "")
        legend.append(LETTERS[state], Style(color=ink, bgcolor=back))
        legend.append(f" {state}")
    return legend


def _short(number: int) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else str(number)
