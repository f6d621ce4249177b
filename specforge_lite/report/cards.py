"""The values a page is made of: tables, cards with a chart, sections; and `render`, which turns them into HTML.

Only text and `Markup` that figures.py made go into a template, which escapes the text: what a model wrote cannot
become markup.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from specforge_lite.report.figures import Bar, Curve, curve_colours, draw_bars, draw_curves, svg_chart
from specforge_lite.report.tables import Table, visible

MAX_POINTS = 240  # a line on 290 units cannot show more


@dataclass(frozen=True)
class Card:
    """A titled box: a chart, then a legend of (name, text, colour name), then tables, then small print."""

    title: str
    chart: Markup | None = None
    legend: tuple[tuple[str, str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    note: str = ""
    dots: bool = False  # the legend explains what dots are
    wide: bool = False


@dataclass(frozen=True)
class PageSection:
    """A heading with cards below it, and generations."""

    title: str
    cards: Sequence[Card] = ()
    note: str = ""
    samples: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    dense: bool = False  # cards of different heights fill columns one after another, rather than rows


def short_number(value: float) -> str:
    """Few characters: 0.034, 1.2, 1,500, 4.9×10⁻⁵."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa.removesuffix('.0')}×10{power}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}%"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("specforge_lite.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )  # fmt: skip


def render(template: str, **values: Any) -> str:
    """A template of this package. Text is escaped; only `Markup`, which figures.py alone makes, is not."""
    style = Markup((Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8"))
    return _environment().get_template(template).render(style=style, **values)


def curves_card(title: str, note: str, curves: Sequence[Curve], floor: float | None) -> Card:
    finite = [value for curve in curves for value in curve.y if math.isfinite(value)]
    if not finite:
        return Card(title, note="No finite value was recorded.")
    legend = []
    for curve, colour in zip(curves, curve_colours(curves)):
        if curve.position is None:
            peak = f"peak {short_number(max(curve.y))}" if curve.panel == "learning_rate" else _last(curve)
            legend.append((curve.label.replace("_", " "), peak, colour))
        elif not curve.held_out or not any(c.position == curve.position and not c.held_out for c in curves):
            twin = next((c for c in curves if c.held_out and c.position == curve.position and c is not curve), None)
            text = _last(curve) + (f" · held-out {_last(twin)}" if twin else "")
            legend.append((f"position {curve.position}", text, colour))

    def draw(ax: Any, palette: Mapping[str, str]) -> None:
        draw_curves(ax, [thinned(curve) for curve in curves], palette, floor)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(lambda value, _: short_number(value))

    spoken = f"{title}: {', '.join(f'{name} {text}' for name, text, _ in legend)}"
    dots = any(curve.held_out for curve in curves) and not all(curve.held_out for curve in curves)
    return Card(title, svg_chart(draw, spoken, x_label="optimizer step"), tuple(legend), note=note, dots=dots)


def _last(curve: Curve) -> str:
    return short_number(next((value for value in reversed(curve.y) if math.isfinite(value)), math.nan))


def thinned(curve: Curve) -> Curve:
    """At most MAX_POINTS points: means of neighbouring ones."""
    if curve.held_out or len(curve.x) <= MAX_POINTS:
        return curve
    edges = [round(i * len(curve.x) / MAX_POINTS) for i in range(MAX_POINTS + 1)]
    x, y = ([sum(v[a:b]) / (b - a) for a, b in itertools.pairwise(edges)] for v in (curve.x, curve.y))
    return Curve(curve.label, curve.panel, curve.position, curve.held_out, x, y)


def bars_card(
    title: str, bars: Sequence[Bar], note: str = "", limit: float | None = None, reference: float | None = None,
    x_label: str = "", name: str = "",
) -> Card:  # fmt: skip
    """A card with one bar chart; shares (limit 1) have an axis in percent. name: for a screen reader."""

    def draw(ax: Any, palette: Mapping[str, str]) -> None:
        draw_bars(ax, bars, palette, reference, limit)
        ax.grid(False, axis="y")
        if limit == 1.0:
            ax.xaxis.set_major_formatter(lambda value, _: percent(value))

    spoken = f"{name or title}: {', '.join(f'{bar.label} {bar.text}' for bar in bars)}"
    right = 10 + 6.0 * max(len(bar.text) for bar in bars)
    return Card(title, svg_chart(draw, spoken, 22.0 * len(bars) + 34, x_label, right), note=note)
