"""One chart as an SVG, without scripts or fonts of its own: lines over a logarithmic x axis, the y
axis from zero or logarithmic. Colours are those of Okabe and Ito."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_WIDTH, _HEIGHT = 640, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 24, 70, 56
_INK, _FAINT = "#222222", "#DDDDDD"


@dataclass(frozen=True, slots=True)
class Line:
    """What is drawn."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y, x above 0."""
    dashed: bool = False
    spread: Sequence[tuple[float, float]] = ()
    """Least and most of each point."""


@dataclass(frozen=True, slots=True)
class Axes:
    """From values to places."""

    x: Sequence[float]
    """All values that are drawn; each has its tick."""
    top: float
    bottom: float
    logarithmic: bool

    def px(self, value: float) -> float:
        low, high = math.log(min(self.x)), math.log(max(self.x))
        share = (math.log(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(self, value: float) -> float:
        if self.logarithmic:
            value, low, high = math.log(value), math.log(self.bottom), math.log(self.top)
        else:
            low, high = 0.0, self.top
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        if self.logarithmic:
            first, last = round(math.log10(self.bottom)), round(math.log10(self.top))
            return [10.0**power for power in range(first, last + 1)]
        step = nice_step(self.top)
        return [step * number for number in range(round(self.top / step) + 1)]


def nice_step(most: float) -> float:
    """1, 2 or 5 times a power of ten, of which four to ten reach `most`."""
    power = 10 ** math.floor(math.log10(most / 4))
    return max(factor * power for factor in (1, 2, 5) if 4 * factor * power <= most)


def axes_of(lines: Sequence[Line], *, logarithmic: bool) -> Axes:
    x = sorted({x for line in lines for x, _ in line.points})
    y = [y for line in lines for _, y in line.points]
    y += [end for line in lines for pair in line.spread for end in pair]
    if logarithmic:
        bottom, top = 10 ** math.floor(math.log10(min(y))), 10 ** math.ceil(math.log10(max(y)))
        return Axes(x, top if top > bottom else 10 * bottom, bottom, True)
    step = nice_step(max(y))
    return Axes(x, step * math.ceil(max(y) / step), 0.0, False)


def draw(
    title: str, x_label: str, y_label: str, lines: Sequence[Line], *, logarithmic: bool = False
) -> str:
    """`logarithmic`: the y axis, too. All values are above 0."""
    axes = axes_of(lines, logarithmic=logarithmic)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12" '
        f'fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        _text(_LEFT, 24, title, size=15),
        *_grid(axes),
        _text(_WIDTH / 2, _HEIGHT - 12, x_label, anchor="middle"),
        _text(_LEFT - 66, _TOP - 10, y_label),
    ]
    for index, line in enumerate(lines):
        parts += _line(axes, line, COLOURS[index % len(COLOURS)], index)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(axes: Axes) -> Iterator[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in axes.ticks():
        y = axes.py(value)
        yield f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="{_FAINT}"/>'
        yield _text(_LEFT - 6, y + 4, f"{value:,.0f}", anchor="end")
    for value in axes.x:
        x = axes.px(value)
        yield f'<path d="M{x:.1f} {bottom}v4" stroke="{_INK}"/>'
        yield _text(x, bottom + 18, f"{value:,.0f}", anchor="middle")


def _line(axes: Axes, line: Line, colour: str, index: int) -> Iterator[str]:
    places = [(axes.px(x), axes.py(y)) for x, y in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
    for x, y in places:
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>'
    for (x, _), (least, most) in zip(places, line.spread, strict=False):
        ends = f"M{x:.1f} {axes.py(least):.1f}V{axes.py(most):.1f}"
        yield f'<path d="{ends}" stroke="{colour}"/>'
    at = _LEFT + 190 * index
    yield f'<path d="M{at} 40h24" stroke="{colour}" stroke-width="2"{dashes}/>'
    yield _text(at + 30, 44, line.name)


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )
