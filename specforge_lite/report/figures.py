"""PNG figures: a run's training curves, and checkpoints compared. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import write_atomically
from specforge_lite.evaluation.checkpoints import best_entry, metric_of

DPI = 130
PANEL_INCHES = (5.2, 3.6)


def new_figure(num_panels: int, columns: int = 2) -> tuple[Any, list[Any]]:
    """(figure, one axes per panel) without touching matplotlib's global state, so that no display is needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(num_panels)]
    for ax in axes:
        ax.grid(True, alpha=0.3)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG atomically. Raises ConfigError when that cannot be."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    try:
        write_atomically(path, data.getvalue())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None


def step_colours(count: int) -> list[Any]:
    """Colours of positions 0, 1, ... in order."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * k / max(count - 1, 1)) for k in range(count)]


def plot_checkpoints(path: Path, entries: Sequence[dict[str, Any]], metric: str, title: str) -> None:
    """Acceptance lengths, accuracies and losses over checkpoints; the best one by `metric` is marked."""
    figure, (lengths, accuracies, losses) = new_figure(3, columns=3)
    places, label = _places(entries)
    for name, text in (("tau_walk", "walk"), ("tau_chain", "all rows"), ("tau_sampling", "sampling")):
        lengths.plot(places, [entry[name] for entry in entries], marker="o", label=text)
    lengths.set_title("estimated acceptance length")
    for ax, key in ((accuracies, "accuracy"), (losses, "loss")):
        num_steps = len(entries[0][key])
        for k, colour in enumerate(step_colours(num_steps)):
            values = [entry[key][k] for entry in entries]
            ax.plot(places, values, marker="o", markersize=3, color=colour, label=f"position {k}")
        ax.set_title(f"{key} by position")
    best = best_entry(entries, metric)
    assert best is not None
    at = places[list(entries).index(best)]
    for ax in (lengths, accuracies, losses):
        ax.axvline(at, color="crimson", linestyle="--", linewidth=1, label=f"best: {best['name']}")
        ax.set_xlabel(label)
        if label == "checkpoint":
            ax.set_xticks(places, [entry["name"] for entry in entries], rotation=45, ha="right")
        ax.legend(fontsize=7)
    figure.suptitle(f"{title}: best {best['name']} by {metric} ({metric_of(best, metric):.4g})")
    save_figure(figure, path)


def _places(entries: Sequence[dict[str, Any]]) -> tuple[list[float], str]:
    """Where each entry stands on the x axis: its step, its epoch, or, where there are both kinds, its index."""
    for key, label in (("step", "optimizer step"), ("epoch", "epoch (state_N)")):
        if all(key in entry for entry in entries):
            return [float(entry[key]) for entry in entries], label
    return [float(index) for index in range(len(entries))], "checkpoint"
