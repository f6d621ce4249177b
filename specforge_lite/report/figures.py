"""One drawer for curves and one for bars, with matplotlib: as PNG in fixed colours, and as SVG inside a page, whose
colours are the CSS variables of templates/report.css (light or dark) and whose text is text.

matplotlib is imported when a figure is drawn, and its global state is not touched: no display is needed.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import user_errors, write_atomically
from specforge_lite.evaluation.checkpoints import best_entry, metric_of
from specforge_lite.report.tables import visible

# A chart in a page is 340 units wide, about its width on a phone, so that its text is readable there.
PAGE_WIDTH, PAGE_HEIGHT = 340.0, 200.0
PANEL_INCHES, DPI = (5.4, 3.7), 130
NUM_RAMP_COLOURS = 8
COLOURS = {
    "ink": "#20242a", "quiet": "#5f6770", "rule": "#d8d8d2", "accent": "#2b6c8f", "second": "#b5651d",
    "third": "#5b8a3c", "fourth": "#84569c", "ramp-0": "#22397a", "ramp-1": "#235d93", "ramp-2": "#1f7f95",
    "ramp-3": "#2f9378", "ramp-4": "#68994a", "ramp-5": "#a38f24", "ramp-6": "#c4741f", "ramp-7": "#b94a36",
}  # fmt: skip
# In an SVG each colour is first a value that nothing else has, and then `var(--NAME)`.
_MARKS = {name: f"#0102{index:02x}" for index, name in enumerate(COLOURS, 1)}
CATEGORIES = ("accent", "second", "third", "fourth")


@dataclass
class Curve:
    """One line of a panel. position: of the drafted token, where the metric has one. held_out: drawn as dots on a
    dashed line. label: what the legend calls it."""

    label: str
    panel: str
    position: int | None
    held_out: bool
    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; `interval` (low, high) is a whisker, `label` stands left, `text` right of it."""

    label: str
    value: float
    text: str
    colour: str = "accent"
    interval: tuple[float, float] | None = None


def ramp(index: int, count: int) -> str:
    """Colour `index` of `count` in order."""
    return f"ramp-{0 if count <= 1 else round(index * (NUM_RAMP_COLOURS - 1) / (count - 1))}"


def curve_colours(curves: Sequence[Curve]) -> list[str]:
    """A colour name per curve: in order of position where there is one, else by turns."""
    count = max((curve.position + 1 for curve in curves if curve.position is not None), default=0)
    names = list(dict.fromkeys(curve.label for curve in curves if curve.position is None))
    return [
        CATEGORIES[names.index(curve.label) % len(CATEGORIES)]
        if curve.position is None
        else ramp(curve.position, count)
        for curve in curves
    ]


def draw_curves(
    ax: Any, curves: Sequence[Curve], palette: Mapping[str, str] = COLOURS, floor: float | None = None
) -> None:
    """Lines for training, dots on a dashed line for held-out data, in order of x; gaps where a value is not finite."""
    for curve, colour in zip(curves, curve_colours(curves)):
        order = sorted(range(len(curve.x)), key=curve.x.__getitem__)
        x = [curve.x[i] for i in order]
        y = [curve.y[i] if math.isfinite(curve.y[i]) else math.nan for i in order]
        style: dict[str, Any] = {"linewidth": 1.5}
        if curve.held_out:
            style = {"linewidth": 0.9, "linestyle": (0, (3, 2)), "marker": "o", "markersize": 3.6}
        elif len(x) == 1:
            style = {"marker": "o", "markersize": 3.6}
        (line,) = ax.plot(x, y, color=palette[colour], label=curve.label, clip_on=False, **style)
        line.set_gid(f"line-{curve.label}")
    if floor is not None:
        ax.set_ylim(bottom=floor)


def draw_bars(
    ax: Any, bars: Sequence[Bar], palette: Mapping[str, str] = COLOURS, reference: float | None = None,
    limit: float | None = None,
) -> None:  # fmt: skip
    """Horizontal bars from zero, the first on top. reference: a dashed line there; limit: right end of the axis."""
    tops = [max(bar.value, bar.interval[1] if bar.interval else 0.0) for bar in bars]
    limit = limit or 1.02 * max([*tops, reference or 0.0, 1e-9])
    for place, (bar, top) in enumerate(zip(bars, tops)):
        (patch,) = ax.barh(place, bar.value, 0.62, color=palette[bar.colour], clip_on=False)
        patch.set_gid(f"bar-{place}")
        if bar.interval:
            ax.plot(bar.interval, (place, place), color=palette["ink"], linewidth=1.1, alpha=0.75, clip_on=False)
        ax.annotate(
            visible(bar.text), (min(top, limit), place), (4, 0), textcoords="offset points", va="center",
            color=palette["ink"], fontsize=ax.xaxis.label.get_size(), annotation_clip=False, parse_math=False,
        )  # fmt: skip
    if reference is not None:
        ax.axvline(reference, color=palette["quiet"], linewidth=1, linestyle=(0, (3, 3)))
    names = [visible(bar.label) for bar in bars]
    ax.set_yticks(range(len(bars)), names, color=palette["ink"], parse_math=False)
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.set_xlim(0, limit)


# --------------------------------------------------------------------------------------------------------------- page


def svg_chart(draw: Any, spoken: str, height: float = PAGE_HEIGHT, x_label: str = "", right: float = 8) -> Markup:
    """An <svg> drawn by `draw(axes, palette)`. spoken: what a screen reader says. right: units left free there."""
    from matplotlib import rc_context

    spoken = visible(spoken)
    figure, (ax,) = new_figure(1, size=(PAGE_WIDTH / 72, height / 72), palette=_MARKS, font_size=10.5)
    draw(ax, _MARKS)
    ax.set_xlabel(x_label)
    for artist in figure.findobj():  # nothing reaches out of the plot, and each clip would be a reference
        artist.set_clip_on(False)
    figure.get_layout_engine().set(rect=(0, 0, 1 - right / PAGE_WIDTH, 1), w_pad=0.02, h_pad=0.03)
    data = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": spoken}):  # text stays text, ids stay the same
        figure.savefig(data, format="svg", transparent=True)
    text = data.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', text, count=1)
    text = re.sub(r"font: (?:bold )?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    for name, mark in _MARKS.items():
        text = text.replace(mark, f"var(--{name})")
    unique = f"c{zlib.crc32((spoken + text).encode())}-"  # ids are unique in a page, not only in a chart
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\1{unique}", text)
    return Markup(re.sub(r"\s*\n\s*", "\n", text).replace('aria-label="@"', f'aria-label="{Markup.escape(spoken)}"'))


# ---------------------------------------------------------------------------------------------------------------- png


def new_figure(
    num_panels: int, columns: int = 2, size: tuple[float, float] = PANEL_INCHES,
    palette: Mapping[str, str] = COLOURS, font_size: float = 9.0,
) -> tuple[Any, list[Any]]:  # fmt: skip
    """(figure, one axes per panel of `size` inches), in our style. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("charts need matplotlib: pip install 'specforge_lite[report]'") from None
    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(num_panels)]
    for ax in axes:
        ax.grid(True, color=palette["rule"], linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0, labelsize=font_size, labelcolor=palette["quiet"])
        ax.xaxis.label.set(color=palette["quiet"], fontsize=font_size)
        for axis in (ax.xaxis, ax.yaxis):
            axis.offsetText.set(color=palette["quiet"], fontsize=font_size)
        ax.locator_params(nbins=5)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG atomically. Raises ConfigError when that cannot be."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    with user_errors(path):
        write_atomically(path, data.getvalue())


def plot_panels(
    path: Path, title: str, panels: Sequence[tuple[str, Sequence[Curve]]], x_label: str, columns: int = 2,
    mark: tuple[float, str] | None = None, ticks: tuple[Sequence[float], Sequence[str]] | None = None,
) -> None:  # fmt: skip
    """A PNG of (title, curves), each with its legend under it. mark: a line across at x, and what it is called."""
    figure, axes = new_figure(len(panels), columns)
    for ax, (name, curves) in zip(axes, panels):
        draw_curves(ax, curves)
        if mark is not None:
            ax.axvline(mark[0], color="crimson", linestyle="--", linewidth=1, label=mark[1])
        ax.set_title(name)
        ax.set_xlabel(x_label)
        if ticks is not None:
            ax.set_xticks(*ticks, rotation=45, ha="right")
        handles, _ = ax.get_legend_handles_labels()
        if len(handles) > 1:
            legend = ax.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=min(4, len(handles)), fontsize=7,
                frameon=False, handlelength=2.6,
            )  # fmt: skip
            for text in legend.get_texts():
                text.set_parse_math(False)
    figure.suptitle(title, parse_math=False)
    save_figure(figure, path)


def plot_checkpoints(path: Path, entries: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Acceptance lengths, accuracies and losses over checkpoints; the best one by `metric` is marked."""
    places, label = _places(entries)
    names = {"tau_walk": "greedy decoding", "tau_chain": "mean over all positions", "tau_sampling": "sampling"}
    names |= {"served": "served"} if "served" in entries[0] else {}
    lengths = [Curve(text, "", None, True, places, [e[name] for e in entries]) for name, text in names.items()]
    panels = [("estimated acceptance length", lengths)]
    for key in ("accuracy", "loss"):
        steps = range(len(entries[0][key]))
        curves = [Curve(f"position {k}", "", k, True, places, [entry[key][k] for entry in entries]) for k in steps]
        panels.append((f"{key} by position", curves))
    best = best_entry(entries, metric)
    assert best is not None
    mark = (places[list(entries).index(best)], f"best: {best['name']}")
    ticks = (places, [entry["name"] for entry in entries]) if label == "checkpoint" else None
    title = f"{title}: best {best['name']} by {metric} ({metric_of(best, metric):.4g})"
    plot_panels(path, title, panels, label, 3, mark, ticks)


def _places(entries: Sequence[dict[str, Any]]) -> tuple[list[float], str]:
    """Where each entry stands on the x axis: its step, its epoch, or, where there are both kinds, its index."""
    for key, label in (("step", "optimizer step"), ("epoch", "epoch (state_N)")):
        if all(key in entry for entry in entries):
            return [float(entry[key]) for entry in entries], label
    return [float(index) for index in range(len(entries))], "checkpoint"
