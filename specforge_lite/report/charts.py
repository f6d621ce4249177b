"""Line and bar charts as inline SVG, without a script and in the colours of the page (light or dark).

Charts are 340 units wide, which is about their width on a phone, so that their text is readable there; on a wide
screen several stand side by side. Colours are CSS variables of assets/report.css.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specforge_lite.report.markup import Html, join, tag

WIDTH, HEIGHT = 340.0, 208.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 8.0, 10.0, 32.0
MAX_POINTS = 240  # a line on 292 units cannot show more
NUM_RAMP_COLOURS = 8


@dataclass(frozen=True)
class Series:
    """A line. `colour` is a CSS colour; points with a value that is not finite interrupt it. Without a name it is not
    in the legend. `markers`: dots at the points; `joined`: a line through them."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    markers: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; `interval` (low, high) is drawn as a whisker, `label` stands left, `value_text` right."""

    label: str
    value: float
    value_text: str
    colour: str = "var(--accent)"
    interval: tuple[float, float] | None = None


def ramp(index: int, count: int) -> str:
    """Colour `index` of `count` in order, from the ramp of the style sheet."""
    place = 0 if count <= 1 else round(index * (NUM_RAMP_COLOURS - 1) / (count - 1))
    return f"var(--ramp-{place})"


def category(index: int) -> str:
    """A colour for things without an order."""
    return f"var(--{('accent', 'second', 'third', 'fourth')[index % 4]})"


def short_number(value: float) -> str:
    """Few characters: 0.034, 1.2, 1500, 15k, 2e-3."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` or below to `high` or above.

    >>> nice_ticks(0.3, 9.1)
    [0.0, 2.5, 5.0, 7.5, 10.0]
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(s * scale for s in (1.0, 2.0, 2.5, 5.0, 10.0) if s * scale >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = max(0, 3 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """At most `limit` points: means of neighbouring ones. Values that are not finite make their mean so, too."""
    if len(x) <= limit:
        return list(x), list(y)
    edges = [round(i * len(x) / limit) for i in range(limit + 1)]
    parts = list(itertools.pairwise(edges))
    return [sum(x[a:b]) / (b - a) for a, b in parts], [sum(y[a:b]) / (b - a) for a, b in parts]


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "optimizer step",
    floor: float | None = None,
    ceiling: float | None = None,
    form: Callable[[float], str] = short_number,
) -> Html:
    """A figure with its legend (last value of each line); `floor` and `ceiling` fix an end of the y axis."""
    points = [(list(s.x), list(s.y)) if s.markers else thin(s.x, s.y) for s in series]
    finite = [v for _, ys in points for v in ys if math.isfinite(v)]
    all_x = [v for xs, _ in points for v in xs]
    if not finite:
        return tag("p", {"class": "note"}, "No finite value was recorded.")
    y_ticks = nice_ticks(min(finite) if floor is None else floor, max(finite) if ceiling is None else ceiling)
    x_low, x_high = min(all_x), max(all_x)
    if 0 < x_low <= 0.1 * x_high:
        x_low = 0.0
    x_ticks = [t for t in nice_ticks(x_low, x_high) if x_low <= t <= x_high] or [x_low]
    if x_high == x_low:
        x_high = x_low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = [_axes(y_ticks, x_ticks, place, x_label, form)]
    drawn += [_line(s, [place(a, b) for a, b in zip(xs, ys)], form) for s, (xs, ys) in zip(series, points)]
    named = [(s.name, form(_last(s.y)), s.colour) for s in series if s.name]
    spoken = f"{title}: {', '.join(f'{name} ends at {value}' for name, value, _ in named)}"
    return tag("figure", {"class": "chart"}, _svg(HEIGHT, spoken, drawn), legend(named))


def bar_chart(
    title: str,
    bars: Sequence[Bar],
    reference: float | None = None,
    full: float | None = None,
    label_width: float = 96.0,
    caption: Sequence[tuple[str, str, str]] = (),
) -> Html:
    """Horizontal bars from zero. `reference`: a dashed line there; `full`: the value of a bar of full length;
    `caption`: legend entries (name, text, colour)."""
    tops = [max(bar.value, bar.interval[1] if bar.interval else 0.0) for bar in bars]
    highest = max([v for v in tops if math.isfinite(v)] + [reference or 0.0, full or 0.0, 1e-12])
    room = max(len(bar.value_text) for bar in bars) * 6.6 + 8
    row, width = 26.0, WIDTH - label_width - room
    height = row * len(bars) + 8

    def across(value: float) -> float:
        return label_width + min(max(value, 0.0), highest) / highest * width

    parts: list[Html] = []
    if full is not None:
        for index in range(len(bars)):
            place = {"x": label_width, "y": index * row + 4 + row * 0.2, "width": width, "height": row * 0.6, "rx": 2}
            parts.append(tag("rect", {"class": "track", **place}))
    if reference is not None:
        x = across(reference)
        parts.append(tag("line", {"class": "reference", "x1": x, "x2": x, "y1": 0.0, "y2": height}))
    for index, bar in enumerate(bars):
        parts.append(_bar(bar, index * row + 4 + row / 2, row, label_width, across))
    spoken = f"{title}: {', '.join(f'{bar.label} {bar.value_text}' for bar in bars)}"
    figure = [_svg(height, spoken, parts)]
    if caption:
        figure.append(legend(caption))
    return tag("figure", {"class": "chart"}, *figure)


def legend(entries: Sequence[tuple[str, str, str]]) -> Html:
    """Chips of (name, value, colour); the value may be empty."""
    items = [
        tag(
            "li",
            None,
            tag("i", {"style": f"background:{colour}"}),
            name,
            *([" ", tag("b", None, value)] if value else []),
        )
        for name, value, colour in entries
    ]
    return tag("figcaption", None, tag("ul", {"class": "legend"}, *items))


def _svg(height: float, spoken: str, parts: Sequence[Html]) -> Html:
    return tag("svg", {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": spoken}, *parts)


def _axes(
    y_ticks: Sequence[float],
    x_ticks: Sequence[float],
    place: Callable[[float, float], tuple[float, float]],
    x_label: str,
    form: Callable[[float], str],
) -> Html:
    parts: list[Html] = []
    for tick in y_ticks:
        y = place(x_ticks[0], tick)[1]
        parts.append(tag("line", {"class": "gridline", "x1": LEFT, "x2": WIDTH - RIGHT, "y1": y, "y2": y}))
        parts.append(tag("text", {"class": "tick", "x": LEFT - 6, "y": y + 3.6, "text-anchor": "end"}, form(tick)))
    for tick in x_ticks:
        x = place(tick, y_ticks[0])[0]
        anchor = "start" if x < LEFT + 12 else "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            tag("text", {"class": "tick", "x": x, "y": HEIGHT - BOTTOM + 13, "text-anchor": anchor}, short_number(tick))
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(tag("text", {"class": "axis", "x": middle, "y": HEIGHT - 4, "text-anchor": "middle"}, x_label))
    return tag("g", None, *parts)


def _line(series: Series, points: Sequence[tuple[float, float]], form: Callable[[float], str]) -> Html:
    """A path with gaps where a value is not finite; a lone point between gaps is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    style = f"stroke:{series.colour}"
    parts = [tag("title", None, f"{series.name}: {form(_last(series.y))} at the end")]
    for run in runs:
        if len(run) > 1 and series.joined:
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(tag("path", {"class": "line", "d": path, "style": style}))
        if series.markers or len(run) == 1:
            dots = (tag("circle", {"class": "dot", "cx": x, "cy": y, "r": 2.6, "style": style}) for x, y in run)
            parts.append(join(dots))
    return tag("g", {"class": "series"}, *parts)


def _bar(bar: Bar, middle: float, row: float, label_width: float, across: Callable[[float], float]) -> Html:
    end = across(bar.value if math.isfinite(bar.value) else 0.0)
    shown = bar.label if len(bar.label) * 6.2 <= label_width else bar.label[: int(label_width / 6.2) - 1] + "…"
    body = {"class": "bar", "x": label_width, "y": middle - row * 0.3, "height": row * 0.6, "rx": 2}
    parts = [
        tag("title", None, f"{bar.label}: {bar.value_text}"),
        tag("text", {"class": "label", "x": label_width - 8, "y": middle + 3.8, "text-anchor": "end"}, shown),
        tag("rect", {**body, "width": max(end - label_width, 0.5), "style": f"fill:{bar.colour}"}),
    ]
    if bar.interval is not None:
        low, end = across(bar.interval[0]), max(end, across(bar.interval[1]))
        parts.append(
            tag(
                "path",
                {
                    "class": "whisker",
                    "d": f"M{low:.1f},{middle:.1f}H{across(bar.interval[1]):.1f}"
                    f"M{low:.1f},{middle - 4:.1f}v8M{across(bar.interval[1]):.1f},{middle - 4:.1f}v8",
                },
            )
        )
    parts.append(tag("text", {"class": "value", "x": end + 6, "y": middle + 3.8}, bar.value_text))
    return tag("g", {"class": "series"}, *parts)


def _last(values: Sequence[float]) -> float:
    return next((v for v in reversed(values) if math.isfinite(v)), float("nan"))
