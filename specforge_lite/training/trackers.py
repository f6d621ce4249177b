"""Where `--report-to` sends metrics. A tracker is one function and one line in TRACKERS; its package is imported when
it is opened."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import write_atomically
from specforge_lite.training.reporting import Tracker
from specforge_lite.training.settings import LoggingSection


def _open_wandb(config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> Tracker:
    """Weights & Biases; the key comes from WANDB_API_KEY or an earlier `wandb login`. WANDB_MODE=offline writes a run
    directory that `wandb sync` takes."""
    import wandb

    offline = os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun")
    if not offline and not os.environ.get("WANDB_API_KEY") and not _has_netrc_entry("api.wandb.ai"):
        raise ConfigError("report_to wandb: set WANDB_API_KEY (or WANDB_MODE=offline)")
    identity = output_dir / "wandb_run_id"  # one run per directory, so that a resumed run continues its curves
    if not identity.exists():
        write_atomically(identity, os.urandom(8).hex().encode())
    name, run_id = config.wandb_name or output_dir.name, identity.read_text().strip()
    run = wandb.init(
        project=config.wandb_project, name=name, dir=str(output_dir), config=run_config, resume="allow", id=run_id
    )
    return Tracker(lambda step, metrics: run.log(numbers(metrics, config.metric_names), step=step), run.finish)


def _open_trackio(config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> Tracker:
    """Hugging Face trackio, a local dashboard with wandb's interface."""
    import trackio

    run = trackio.init(project=config.wandb_project, name=config.wandb_name or output_dir.name, config=run_config)
    return Tracker(lambda step, metrics: run.log(numbers(metrics, config.metric_names), step=step), run.finish)


def _open_tensorboard(config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> Tracker:
    """Event files in OUTPUT_DIR/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(output_dir / "tensorboard"))  # type: ignore[no-untyped-call]

    def log_scalars(step: int, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics, config.metric_names).items():
            writer.add_scalar(name, value, step)

    return Tracker(log_scalars, writer.close)


TRACKERS: dict[str, Callable[[LoggingSection, Path, dict[str, Any]], Tracker]] = {
    "wandb": _open_wandb,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
}


# Our name -> the one on EAGLE's dashboards (SafeAILab/EAGLE, eagle/traineagle3/main.py); lists get the position at the
# end, `train/acc_0`.
EAGLE_NAMES = {
    "accuracies": "train/acc",
    "step_losses": "train/ploss",
    "learning_rate": "train/lr",
    "epoch_accuracies": "train/epochacc",
    "epoch_losses": "train/epochploss",
    "eval/accuracy": "test/epochacc",
    "eval/loss": "test/epochploss",
}


def numbers(metrics: dict[str, Any], metric_names: str = "ours") -> dict[str, float]:
    """Lists become `name/0`, `name/1`, ... (EAGLE's names: `name_0`); text is left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        separator = "/"
        if metric_names == "eagle" and name in EAGLE_NAMES:
            name, separator = EAGLE_NAMES[name], "_"
        if isinstance(value, (int, float)):
            flat[name] = value
        elif isinstance(value, list):
            flat.update({f"{name}{separator}{i}": x for i, x in enumerate(value) if isinstance(x, (int, float))})
    return flat


def _has_netrc_entry(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_tracker(name: str, config: LoggingSection, output_dir: Path, run_config: dict[str, Any]) -> Tracker:
    """One tracker of `--report-to`. Raises ConfigError for a package that cannot be loaded."""
    try:
        return TRACKERS[name](config, output_dir, run_config)
    except ImportError as error:
        raise ConfigError(f"report_to {name}: {error}; install it with `pip install {name}`") from None
