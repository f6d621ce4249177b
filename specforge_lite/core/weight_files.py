"""Which files of a model or draft directory hold its weights, and single tensors read from them.

An index, or else `model.safetensors`, decides; other weight files beside it are not read. Engines read every
`*.safetensors` that no index excludes, so a file left over from another model must not win silently here either: what
is ambiguous is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_lite.core.errors import CheckpointError

WEIGHTS, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# Endings under which `NAME.weight` is stored in the layouts that have no tensor of that name.
PACKED_ENDINGS = ("qweight", "weight_packed")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> safetensors file of a directory.

    Raises CheckpointError where there is none, where it is not clear which files count (an index beside a
    `model.safetensors` that it does not name, two files with a tensor of one name, missing shards), and for an adapter.
    """
    files = safetensors_files(directory)
    if not files:
        raise CheckpointError(f"{directory}: no *.safetensors here; other weight formats are not read")
    index = directory / INDEX_FILE
    if index.exists():
        return _weight_map(index)
    found: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as handle:
            names = handle.keys()
        if twice := found.keys() & names:
            name = min(twice)
            raise CheckpointError(
                f"{directory}: {name} is in {found[name].name} and in {file.name}; delete the one that is left over, or"
                f" give an {INDEX_FILE}"
            )
        found.update(dict.fromkeys(names, file))
    return found


def safetensors_files(directory: Path) -> list[Path]:
    """The safetensors files that count, see `weight_files`; empty where there is none."""
    if (adapter := directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{adapter}: an adapter; engines and this package would read different weights: merge it into its base"
            " model (peft: merge_and_unload) and give that directory"
        )
    return files_that_count(directory, WEIGHTS, INDEX_FILE, "*.safetensors")


def files_that_count(directory: Path, single: str, index_name: str, pattern: str) -> list[Path]:
    """The files that an index lists, else `single`, else those that fit `pattern`; empty where there is none."""
    index, whole = directory / index_name, directory / single
    if index.exists():
        named = list(dict.fromkeys(_weight_map(index).values()))
        if whole.exists() and whole not in named:
            raise CheckpointError(
                f"{directory}: {single}, and an {index_name} that does not name it; delete the one that is left over"
            )
        return sorted(named)
    if whole.exists():
        return [whole]
    files = sorted(directory.glob(pattern))
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            stem, total = file.name[: match.start(1)], int(match[2])
            wanted = {f"{stem}{i:05d}-of-{match[2]}{file.suffix}" for i in range(1, total + 1)}
            if missing := sorted(wanted - {other.name for other in files}):
                raise CheckpointError(f"{directory / missing[0]}: missing, {file.name} is one of {total} shards")
    return files


def _weight_map(index: Path) -> dict[str, Path]:
    """Tensor name -> file, as a shard index lists them; each file must lie beside the index."""
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: expected a JSON object with a 'weight_map' of tensor names to files: {error}"
        ) from None
    for file in dict.fromkeys(weight_map.values()):
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: file name {file!r} leaves the directory")
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent / file}: missing, {index.name} names it")
    return {name: index.parent / file for name, file in weight_map.items()}


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """A safetensors file, opened for single tensors. Raises CheckpointError for one that is cut off or damaged, and
    for a tensor that is not in it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None


def read_weight(files: dict[str, Path], name: str) -> Tensor | None:
    """One tensor of `files`, named as in `logical_names`; fp8 times its scale, in bf16; other quantised ones, in fp32.
    None for a tensor that is not there, or whose numbers mean nothing by themselves. Raises CheckpointError."""

    def read(part: str) -> Tensor | None:
        if part not in files:
            return None
        with open_safetensors(files[part]) as handle:
            tensor: Tensor = handle.get_tensor(part)
            return tensor

    tensor = read(name)
    if tensor is not None and (tensor.element_size() > 1 or not name.endswith("weight")):
        return tensor
    stem = name.removesuffix("weight")
    if tensor is None and not any(stem + ending in files for ending in PACKED_ENDINGS):
        return None
    from specforge_lite.core.quantized import read_quantized

    return read_quantized(files, name, tensor, read)


def logical_names(files: dict[str, Path]) -> dict[str, None]:
    """Names of `files`, those of packed weights as `NAME.weight`."""
    pattern = re.compile(rf"\.({'|'.join(PACKED_ENDINGS)})$")
    return dict.fromkeys(pattern.sub(".weight", name) for name in files)
