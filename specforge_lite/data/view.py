"""What is trained and what is masked, for a person's eye: in the terminal, or as one HTML file.

Text comes from data and may hold anything: control characters are shown as symbols, and HTML is escaped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import user_errors, write_atomically
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.types import TokenizedSample

Decode = Callable[[list[int]], str]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all trained, or all masked."""

    text: str
    trained: bool
    num_tokens: int


def runs(sample: TokenizedSample, decode: Decode) -> list[Run]:
    """The text of a sample in runs. Decoded up to each border, because a decoder may drop the space a text starts
    with; a character split between runs appears in the later one."""
    ids, mask = sample.input_ids_L.tolist(), sample.loss_mask_L.numpy()
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    result: list[Run] = []
    shown = 0
    for start, end in itertools.pairwise(borders):
        text = decode(ids[:end])
        stop = len(text) if end == len(ids) else len(text.rstrip("\ufffd"))
        result.append(Run(text[shown:stop], bool(mask[start]), end - start))
        shown = max(shown, stop)
    return result


def visible(text: str) -> str:
    """Control and direction characters as symbols (so that data cannot drive a terminal); line ends and tabs stay."""
    return _CONTROL.sub(lambda match: chr(0x2400 + ord(match[0])) if ord(match[0]) < 32 else "\ufffd", text)


def _shown(dataset: TokenizedDataset, indices: Sequence[int], decode: Decode) -> list[tuple[str, list[Run]]]:
    """A line about each sample, and its runs, fit to be shown. Raises DataError for an index outside the dataset."""
    if outside := [index for index in indices if not 0 <= index < len(dataset)]:
        raise DataError(f"--view-train-data {outside[0]}: expected numbers from 0 to {len(dataset) - 1}")
    result = []
    for index in indices:
        sample = dataset[index]
        trained = int(sample.loss_mask_L.sum())
        place = f"sample {index} (id {sample.sample_id}, line {dataset.line(index)})"
        title = f"{place}: {len(sample)} tokens, {trained} trained ({trained / len(sample):.0%})"
        result.append((visible(title), [replace(run, text=visible(run.text)) for run in runs(sample, decode)]))
    return result


def print_samples(dataset: TokenizedDataset, indices: Sequence[int], decode: Decode) -> None:
    """Print samples, trained tokens green and masked ones red. Where colours cannot be shown (a file, NO_COLOR),
    trained text stands in brackets."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for title, parts in _shown(dataset, indices, decode):
        console.print(Text(title, style="bold"))
        text = Text()
        for run in parts:
            if console.color_system is None:
                text.append(f"⟦{run.text}⟧" if run.trained else run.text)
            else:
                text.append(run.text, style="green" if run.trained else "red")
        console.print(text)


def write_html(dataset: TokenizedDataset, indices: Sequence[int], decode: Decode, path: str | Path) -> None:
    """Write samples as one self-contained HTML file (no script, nothing loaded), trained text on green."""
    import jinja2

    source = (resources.files("specforge_lite.assets") / "view.html.j2").read_text("utf-8")
    page = jinja2.Environment(autoescape=True).from_string(source)
    html = page.render(samples=_shown(dataset, indices, decode), summary=dataset.stats.summary())
    with user_errors(Path(path)):
        write_atomically(Path(path), html)
