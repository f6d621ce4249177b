"""Where `prepare_data` takes rows from: data sets of the hub by name, local files, directories of files, source code.

Nothing is downloaded unless a hub data set is asked for by its name without `--data-path`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import DataError, first_line, suggest
from specforge_lite.data.fim_source import FimSourceOptions, fim_rows
from specforge_lite.data.reading import BadRow, Row, RowFile

FILE_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
SAMPLE = "gsm8k-sample"


@dataclass(frozen=True)
class HubDataset:
    """A data set of huggingface.co: repository, configuration, split, and single file where it has to be named."""

    repository: str
    split: str = "train"
    configuration: str | None = None
    data_file: str | None = None


PRESETS: dict[str, HubDataset] = {
    "sharegpt": HubDataset("Aeala/ShareGPT_Vicuna_unfiltered", data_file="ShareGPT_V4.3_unfiltered_cleaned_split.json"),
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "gsm8k": HubDataset("openai/gsm8k", configuration="main"),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
    "magpie": HubDataset("Magpie-Align/Magpie-Qwen2.5-Pro-1M-v0.1"),
    "perfectblend": HubDataset("mlabonne/open-perfectblend"),
    "opc": HubDataset("OpenCoder-LLM/opc-sft-stage1", configuration="largescale_diverse_instruct"),
}


@dataclass(frozen=True)
class Source:
    """A data set to read. name: what output files are called after; path or hub is set, or source_dir for code."""

    name: str
    path: Path | None = None
    hub: HubDataset | None = None
    source_dir: Path | None = None
    fim: FimSourceOptions | None = None

    def __str__(self) -> str:
        return str(self.path or self.source_dir or (self.hub.repository if self.hub else self.name))

    def rows(self) -> Iterator[tuple[str, Row | BadRow]]:
        """All rows, one at a time, and where each stands, for people: `file:line`, or `repository[number]`. Raises
        DataError for what cannot be read to its end."""
        if self.source_dir is not None:
            for row in fim_rows(self.source_dir, self.fim or FimSourceOptions()):
                if isinstance(row, BadRow):
                    yield f"{self.source_dir}:{row.line}", row
                else:
                    line = int(row.id.rpartition(":")[2].split("-")[0])
                    yield f"{self.source_dir / row.source}:{line}", Row(line, row.to_row())
        elif self.path is not None:
            for file in _files(self.path):
                with RowFile(file) as rows:
                    for value in rows:
                        yield f"{file}:{value.line}", value
        elif self.hub is not None:
            yield from _hub_rows(self.hub)


def choose_source(
    dataset: str, data_path: Path | None, source_dir: Path | None, fim: FimSourceOptions | None = None
) -> Source:
    """The source that `--dataset` names: a preset, `fim`, the shipped sample, or a path. Raises DataError."""
    if dataset == "fim":
        if source_dir is None:
            raise DataError("--dataset fim: needs --source-dir DIR with source code")
        return Source("fim", source_dir=source_dir, fim=fim)
    if source_dir is not None:
        raise DataError(f"--source-dir goes with --dataset fim, found --dataset {dataset}")
    if dataset == SAMPLE:
        return Source(SAMPLE, path=data_path or shipped_file("gsm8k_test.jsonl"))
    if dataset in PRESETS:
        return Source(dataset, path=data_path, hub=PRESETS[dataset])
    if data_path is not None:
        raise DataError(f"--data-path goes with the name of a data set; '{dataset}'{suggest(dataset, PRESETS)}")
    path = Path(dataset)
    if not path.exists():
        known = [*PRESETS, SAMPLE, "fim"]
        hint = suggest(dataset, known)
        also = f"; known: {', '.join(known)}" if hint.startswith("; did") else ""
        raise DataError(f"--dataset {dataset}: no such file, directory or data set{hint}{also}")
    return Source(path.name.split(".")[0] or "data", path=path)


def shipped_file(name: str) -> Path:
    """Path of a prompt file that comes with the package."""
    return Path(str(resources.files("specforge_lite.assets") / "prompts" / name))


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or directory")
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.name.endswith(FILE_ENDINGS) and file.is_file())
    if not files:
        raise DataError(f"{path}: no data file in it; expected {', '.join(FILE_ENDINGS)}")
    return files


def _hub_rows(hub: HubDataset) -> Iterator[tuple[str, Row]]:
    """Stream a data set of the hub; nothing is kept on disk but what `datasets` caches of its listing."""
    import datasets

    datasets.disable_progress_bars()
    number = 0
    try:
        stream: Any = datasets.load_dataset(
            hub.repository, hub.configuration, split=hub.split, data_files=hub.data_file, streaming=True
        )
        for number, value in enumerate(stream, 1):
            yield f"{hub.repository}[{number}]", Row(number, value)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{hub.repository}: cannot read it from the hub after {number} rows ({first_line(error)});"
            " give a local copy with --data-path"
        ) from None
