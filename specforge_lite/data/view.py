"""What is trained and what is masked, for a person's eye: in the terminal, or as one HTML file.

Text comes from data and may hold anything: control characters are shown as symbols, and HTML is escaped.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specforge_lite.core.errors import DataError
from specforge_lite.core.files import atomic_file, user_errors
from specforge_lite.data.store import TokenizedDataset
from specforge_lite.types import TokenizedSample

Decode = Callable[[list[int]], str]

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f6;padding:1em;border-radius:6px}"
    ".t{background:#c8f0cf;color:#0a4d19}.m{color:#a33}h2{font-size:1em}"
)


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


def _check_indices(dataset: TokenizedDataset, indices: Sequence[int]) -> None:
    """Raise DataError for an index outside the dataset."""
    for index in indices:
        if not 0 <= index < len(dataset):
            raise DataError(f"--view-train-data {index}: expected numbers from 0 to {len(dataset) - 1}")


def title(dataset: TokenizedDataset, index: int, sample: TokenizedSample) -> str:
    """One line about a sample."""
    trained = int(sample.loss_mask_L.sum())
    return (
        f"sample {index} (id {sample.sample_id}, line {dataset.line(index)}):"
        f" {len(sample)} tokens, {trained} trained ({trained / len(sample):.0%})"
    )


def print_samples(dataset: TokenizedDataset, indices: Sequence[int], decode: Decode) -> None:
    """Print samples, trained tokens green and masked ones red. Where colours cannot be shown (a file, NO_COLOR),
    trained text stands in brackets."""
    from rich.console import Console
    from rich.text import Text

    _check_indices(dataset, indices)
    console = Console(highlight=False, soft_wrap=True)
    for index in indices:
        sample = dataset[index]
        console.print(Text(visible(title(dataset, index, sample)), style="bold"))
        text = Text()
        for run in runs(sample, decode):
            shown = visible(run.text)
            if console.color_system is None:
                text.append(f"⟦{shown}⟧" if run.trained else shown)
            else:
                text.append(shown, style="green" if run.trained else "red")
        console.print(text)


def write_html(dataset: TokenizedDataset, indices: Sequence[int], decode: Decode, path: str | Path) -> None:
    """Write samples as one self-contained HTML file (no script, nothing loaded), trained text on green."""
    _check_indices(dataset, indices)
    parts = []
    for index in indices:
        sample = dataset[index]
        spans = "".join(
            f'<span class="{"t" if run.trained else "m"}" title="{run.num_tokens} tokens,'
            f' {"trained" if run.trained else "masked"}">{html.escape(visible(run.text))}</span>'
            for run in runs(sample, decode)
        )
        parts.append(f'<h2>{html.escape(visible(title(dataset, index, sample)))}</h2>\n<pre dir="auto">{spans}</pre>')
    page = (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Training data</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style>\n<h1>Training data</h1>\n"
        '<p><span class="t">Green</span> is trained, <span class="m">red</span> is masked. '
        f"{html.escape(dataset.stats.summary())}</p>\n" + "\n".join(parts) + "\n</html>\n"
    )
    with user_errors(Path(path)), atomic_file(Path(path)) as file:
        file.write(page)
