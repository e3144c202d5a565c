"""A picture of a run: stages × time coloured by state, each stage's whole time, and where KV lived.

One SVG without scripts or fonts of its own. Colours are those of Okabe and Ito, which people with
any common colour blindness tell apart; the legend names them in the same order as the table.
"""

import math
from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from pipemax.services.simulator.records import STAGE_STATES, Result, Sample
from pipemax.services.simulator.spec import SimulationSpec

COLOURS = {
    "compute": "#0072B2",
    "wait_plan": "#BBBBBB",
    "wait_activation": "#E69F00",
    "wait_kv": "#D55E00",
    "prepare": "#CC79A7",
    "send": "#56B4E9",
    "down": "#000000",
}
MEANINGS = {
    "compute": "compute",
    "wait_plan": "wait_plan: nothing to do",
    "wait_activation": "wait_activation: the stage before is not done",
    "wait_kv": "wait_kv: the prefetch is late",
    "prepare": "prepare",
    "send": "send",
    "down": "down: crashed or starting again",
}
_DEVICE, _HOST = "#009E73", "#CC79A7"
_WIDTH, _LEFT, _PLOT, _GAP, _BAR = 1200, 90, 760, 40, 250
_ROW, _TOP = 26, 92
_KV_HEIGHT = 170
_INK, _FAINT = "#222222", "#DDDDDD"


def draw_svg(spec: SimulationSpec, result: Result, title: str) -> str:
    """The picture. The left chart shows the window `spec.gantt_s`, all others the whole run."""
    rows = _ROW * spec.num_gpus
    kv_top = _TOP + rows + 92
    height = kv_top + _KV_HEIGHT + 56
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13" '
        f'fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(24, 30, title, size=17, weight="bold"),
        _text(_WIDTH - 24, 30, _figures(result), anchor="end"),
        *_legend(result),
        *_gantt(spec, result),
        *_shares(spec, result),
        *_residency(result, kv_top),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _figures(result: Result) -> str:
    return (
        f"{result.output_tokens_per_s:,.0f} output tokens/s, "
        f"{1 - result.bubble_share:.0%} of the time computing"
    )


def _legend(result: Result) -> Iterator[str]:
    x = 24.0
    for state in _seen_states(result):
        yield f'<rect x="{x:.0f}" y="44" width="13" height="13" fill="{COLOURS[state]}"/>'
        yield _text(x + 18, 55, MEANINGS[state])
        x += 40 + 7.2 * len(MEANINGS[state])


def _gantt(spec: SimulationSpec, result: Result) -> Iterator[str]:
    start_s, end_s = spec.gantt_s or (0.0, 0.0)
    yield _text(_LEFT, _TOP - 10, "What each stage did, step by step", weight="bold")
    for stage in range(spec.num_gpus):
        y = _TOP + stage * _ROW
        yield _text(_LEFT - 8, y + 17, f"stage {stage}", anchor="end")
        yield _box(_LEFT, y + 2, _PLOT, _ROW - 4, _FAINT)
    scale = _PLOT / (end_s - start_s) if end_s > start_s else 0.0
    for interval in result.intervals:
        x = _LEFT + (interval.start_s - start_s) * scale
        width = (interval.end_s - interval.start_s) * scale
        y = _TOP + interval.stage * _ROW + 2
        # A hair between neighbours shows where one step ends and the next begins.
        drawn = width - min(0.8, 0.15 * width) if interval.state == "compute" else width
        yield _box(x, y, drawn, _ROW - 4, COLOURS[interval.state])
    bottom = _TOP + spec.num_gpus * _ROW
    yield from _time_axis(start_s, end_s, _LEFT, _PLOT, _TOP, bottom)


def _shares(spec: SimulationSpec, result: Result) -> Iterator[str]:
    left = _LEFT + _PLOT + _GAP
    yield _text(left, _TOP - 10, "Share of the whole run", weight="bold")
    for index, stage in enumerate(result.stages):
        x = float(left)
        y = _TOP + index * _ROW + 2
        state_s = result.state_s_since_start(stage)
        for state in STAGE_STATES:
            width = _BAR * state_s[state] / result.working_s
            if width > 0:
                yield _box(x, y, width, _ROW - 4, COLOURS[state])
            x += width
        share = state_s["compute"] / result.working_s
        yield _text(left + 8, y + 15, f"{share:.1%}", colour="white", weight="bold")
    bottom = _TOP + spec.num_gpus * _ROW
    for percent in (0, 50, 100):
        x = left + _BAR * percent / 100
        yield _line(x, _TOP, x, bottom + 4, _INK if percent == 0 else "#888888")
        yield _text(x, bottom + 18, f"{percent} %", anchor="middle")


def _residency(result: Result, top: int) -> Iterator[str]:
    samples = result.timeline
    bottom = top + _KV_HEIGHT
    capacity = result.num_device_blocks * result.block_size
    most = max([capacity, *(max(s.device_tokens, s.host_tokens) for s in samples)])
    width = _PLOT + _GAP + _BAR
    yield _text(_LEFT, top - 12, "Where KV lived, tokens of context", weight="bold")
    x = _LEFT + 290.0
    yield _box(x, top - 23, 13, 13, _DEVICE, 0.45)
    yield _text(x + 18, top - 12, "on the devices")
    yield _box(x + 140, top - 18, 18, 3, _HOST)
    yield _text(x + 164, top - 12, "in host memory, copies of the devices' included")
    yield _text(x + 500, top - 12, "- - -  room on the devices")
    ceiling, step = _nice(most)
    for index in range(round(ceiling / step) + 1):
        y = bottom - _KV_HEIGHT * index * step / ceiling
        yield _line(_LEFT, y, _LEFT + width, y, _FAINT)
        yield _text(_LEFT - 8, y + 4, _short(index * step), anchor="end")
    end_s = max(result.simulated_s, 1e-12)

    def place(sample: Sample, tokens: int) -> str:
        x = _LEFT + width * sample.at_s / end_s
        return f"{x:.1f},{bottom - _KV_HEIGHT * tokens / ceiling:.1f}"

    start_width = width * result.start_s / end_s
    if start_width > 0:
        yield _box(_LEFT, top, start_width, _KV_HEIGHT, _FAINT, 0.5)
        if start_width > 40:
            yield _text(_LEFT + start_width / 2, top + 22, "start", anchor="middle")
    if samples:
        points = [place(sample, sample.device_tokens) for sample in samples]
        last = points[-1].split(",")[0]
        area = " ".join([f"{_LEFT},{bottom}", *points, f"{last},{bottom}"])
        yield f'<polygon points="{area}" fill="{_DEVICE}" fill-opacity="0.45"/>'
        line = " ".join(place(sample, sample.host_tokens) for sample in samples)
        yield f'<polyline points="{line}" fill="none" stroke="{_HOST}" stroke-width="2.5"/>'
    y = bottom - _KV_HEIGHT * capacity / ceiling
    yield _line(_LEFT, y, _LEFT + width, y, _INK, dash="6 4")
    yield from _time_axis(0.0, result.simulated_s, _LEFT, width, top, bottom)


def _seen_states(result: Result) -> list[str]:
    """States that took any time; compute always."""
    return [
        state
        for state in STAGE_STATES
        if state == "compute" or any(stage.state_s[state] > 0 for stage in result.stages)
    ]


def _time_axis(
    start_s: float, end_s: float, left: float, width: float, top: float, bottom: float
) -> Iterator[str]:
    yield _line(left, bottom, left + width, bottom, _INK)
    if end_s <= start_s:
        return
    _, step = _nice(end_s - start_s)
    digits = max(0, -math.floor(math.log10(step)))
    for index in range(math.ceil(start_s / step - 1e-9), math.floor(end_s / step + 1e-9) + 1):
        x = left + width * (index * step - start_s) / (end_s - start_s)
        yield _line(x, bottom, x, bottom + 5, _INK)
        yield _text(x, bottom + 18, f"{index * step:.{digits}f}", anchor="middle")
    yield _text(left + width / 2, bottom + 36, "simulated time, seconds", anchor="middle")


def _nice(most: float) -> tuple[float, float]:
    """(ceiling, step) of an axis from 0 that shows `most` with four to nine steps."""
    most = max(most, 1e-9)
    raw = most / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return step * math.ceil(most / step - 1e-9), step


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number:g}"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: str = "normal",
    colour: str = _INK,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{escape(text)}</text>'
    )


def _box(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0) -> str:
    faded = "" if opacity == 1.0 else f' fill-opacity="{opacity:g}"'
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" '
        f'fill="{colour}"{faded}/>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dashes}/>'
    )


def seen_states(results: Sequence[Result]) -> list[str]:
    """States that took any time in one of the runs, in the order of the legend."""
    seen = {state for result in results for state in _seen_states(result)}
    return [state for state in STAGE_STATES if state in seen]
