"""Where metrics go: a JSON-lines file always, and wandb, tensorboard or trackio where asked for.

A tracker is one class and one line in TRACKERS. Packages are imported when the tracker is opened.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.files import write_atomically
from specforge_lite.training.settings import LoggingSection

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Receives flat metrics of a step."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """OUTPUT_DIR/metrics.jsonl: one object per line, `step` first; a line is on the disk when `log` returns to the
    operating system. On resume, lines after `resume_step` (steps that are trained again) are dropped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            write_atomically(path, _lines_up_to(path, resume_step))
        self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._stream.write(json.dumps({"step": step, **metrics}) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def _lines_up_to(path: Path, step: int) -> bytes:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # half a line of a killed run
            continue
    return b"".join(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl; raises DataError with the line number of a broken one."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
    return rows


class WandbTracker:
    """Weights & Biases; the key comes from WANDB_API_KEY or an earlier `wandb login`."""

    def __init__(self, config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> None:
        wandb = _import("wandb")
        offline = os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun")
        if not offline and not os.environ.get("WANDB_API_KEY") and not _has_netrc_entry("api.wandb.ai"):
            raise ConfigError("report_to wandb: set WANDB_API_KEY (or WANDB_MODE=offline)")
        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or output_dir.name,
            dir=str(output_dir),
            config=run_config,
            resume="allow",
            id=_run_id(output_dir),
        )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """Event files in OUTPUT_DIR/tensorboard."""

    def __init__(self, config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> None:
        _import("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in _numbers(metrics).items():
            self._writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self._writer.close()  # type: ignore[no-untyped-call]


class TrackioTracker:
    """Hugging Face trackio, a local dashboard with wandb's interface."""

    def __init__(self, config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> None:
        trackio = _import("trackio")
        self._run = trackio.init(
            project=config.wandb_project, name=config.wandb_name or output_dir.name, config=run_config
        )

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[LoggingSection, Path, dict[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
}


def open_trackers(
    config: LoggingSection, output_dir: Path, run_config: dict[str, Any], resume_step: int
) -> list[Tracker]:
    """The JSON-lines file and every tracker of `--report-to`. Raises ConfigError for a package that is missing."""
    trackers = [TRACKERS[name](config, output_dir, run_config) for name in config.trackers]
    return [JsonlTracker(output_dir / METRICS_FILE, resume_step), *trackers]


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"report_to {package}: {error}; install it with `pip install {package}`") from None


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Lists become `name/0`, `name/1`, ...; text is left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            flat[name] = value
        elif isinstance(value, list):
            flat.update({f"{name}/{i}": item for i, item in enumerate(value) if isinstance(item, (int, float))})
    return flat


def _run_id(output_dir: Path) -> str:
    """One wandb run per output directory, so that a resumed run continues its curves."""
    path = output_dir / "wandb_run_id"
    if not path.exists():
        write_atomically(path, os.urandom(8).hex().encode())
    return path.read_text().strip()


def _has_netrc_entry(host: str) -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
