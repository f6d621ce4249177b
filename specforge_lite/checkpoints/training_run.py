"""Reading training checkpoints `OUTPUT_DIR/step_N` (their files: `training/checkpoint.py`, which writes them)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_lite.core.errors import CheckpointError
from specforge_lite.core.files import read_json, sha256_of
from specforge_lite.core.log import warn

FORMAT_VERSION = 1
TRAINING_CONFIG, TRAINING_WEIGHTS = "draft_config.json", "draft.safetensors"
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class SavedState:
    """The JSON part of a checkpoint. `step`: optimizer steps done. `data`: state of the sampler.
    `counters`: skipped samples, non-finite steps, seconds."""

    step: int
    data: dict[str, Any]
    counters: dict[str, float]
    world_size: int


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint directories, newest step first, complete or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in output_dir.iterdir() if (m := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify_checkpoint(path: Path) -> None:
    """Raise CheckpointError, naming file and difference, unless every file has the size and hash of the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        version = manifest["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no {MANIFEST}: the save was interrupted") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: not readable: {error}") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version}; this version reads format {FORMAT_VERSION}")
    for name, expected in files:
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: file name {name!r} leaves the directory")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{file}: {size} bytes, the manifest says {expected['size']}")
        if sha256_of(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: content differs from its sha256 in the manifest")


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint whose hashes are right; damaged ones are named in a warning. None: no checkpoint at all.

    Raises CheckpointError when there are checkpoints but none is complete (training from scratch would hide the loss).
    """
    candidates = checkpoints(output_dir)
    for path in candidates:
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint is not used: {error}")
        else:
            return path
    if candidates:
        raise CheckpointError(
            f"{output_dir}: {len(candidates)} checkpoint(s), all damaged; --overwrite deletes them and starts again"
        )
    return None


def is_complete(path: Path) -> bool:
    """True if `verify_checkpoint` finds nothing wrong."""
    try:
        verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def read_state(path: Path) -> SavedState:
    """The JSON state of a checkpoint."""
    values = read_config(path / "state.json")
    kinds = {"step": int, "data": dict, "counters": dict, "world_size": int}
    for name, kind in kinds.items():
        if name not in values:
            raise CheckpointError(f"{path / 'state.json'}: '{name}' is missing")
        if not isinstance(values[name], kind):
            raise CheckpointError(f"{path / 'state.json'}: {name}: expected {kind.__name__}, found {values[name]!r}")
    return SavedState(values["step"], values["data"], values["counters"], values["world_size"])


def read_config(file: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint or draft. Raises CheckpointError."""
    return read_json(file, CheckpointError)


def read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of some safetensors files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: not a readable safetensors file: {error}") from None
    return tensors
