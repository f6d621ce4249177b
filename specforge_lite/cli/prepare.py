"""Turn a data set into the normal form: `python scripts/prepare_data.py --dataset sharegpt --output-path cache/data`.

`--dataset` is a data set of the hub by name (sharegpt, ultrachat, gsm8k, alpaca, magpie, perfectblend, opc; with
`--data-path` from a local copy), `gsm8k-sample` (shipped with the package), `fim` with `--source-dir DIR` (holes cut
out of source code), or a local file or directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from specforge_lite.core.log import info
from specforge_lite.core.settings import Section, parse_config


class PrepareConfig(Section):
    """What to read and what to write."""

    dataset: str = Field(description="name of a data set, or PATH of a file or directory")
    output_path: Path = Field(Path("cache/dataset"), description="directory, or a file name ending in .jsonl")
    data_path: Path | None = Field(None, description="local copy of a named data set; nothing is downloaded")
    data_format: Literal["auto", "chat", "fim"] = Field("auto", description="refuse rows of the other format")
    sample_size: int | None = Field(None, ge=1, description="rows to draw at random; default: all")
    split_eval: float = Field(0.0, ge=0, lt=1, description="share of rows (for code: of files) kept for evaluation")
    seed: int = Field(0, ge=0, description="decides sample, split and holes")
    source_dir: Path | None = Field(None, description="directory of source code for --dataset fim")
    exclude_dirs: tuple[str, ...] = Field(
        ("site-packages", "node_modules"), description="names of directories below it to pass over"
    )
    rows_per_file: int = Field(4, ge=1, description="at most so many holes per source file")
    max_context_chars: int = Field(6000, ge=100, description="characters kept before and after a hole")


def main() -> None:
    config = parse_config(PrepareConfig, description=__doc__ or "")
    from specforge_lite.data.fim_source import FimSourceOptions
    from specforge_lite.data.prepare import PrepareOptions, output_files, prepare
    from specforge_lite.data.sources import choose_source

    fim = FimSourceOptions(
        config.rows_per_file, config.max_context_chars, seed=config.seed, exclude_dirs=config.exclude_dirs
    )
    source = choose_source(config.dataset, config.data_path, config.source_dir, fim)
    files = output_files(config.output_path, source, config.split_eval > 0)
    options = PrepareOptions(config.sample_size, config.split_eval, config.seed, config.data_format)
    report = prepare(source, files, options)
    info(f"{source}: {report.summary()}")
    info(f"training data: {files.train}")
    if config.split_eval:
        info(f"evaluation data: {files.evaluation}")
    if report.rejected:
        info(f"what was left out, and why: {files.rejected}")
