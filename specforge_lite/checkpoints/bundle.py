"""A directory ready for `hf upload`: the exported draft, a model card, and the target's tokenizer if asked for.

The card is written from what the training run recorded and from the results that are handed in; what is not known is
left out. Local paths are cut to their last part everywhere, since a bundle is published.
"""

from __future__ import annotations

import os
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.files import atomic_directory, read_json, user_errors, write_json
from specforge_lite.serving.engine import ServingOptions, block_length
from specforge_lite.serving.environment import SERVING_ENGINES

NUM_DRAFT_TOKENS = 3
SETTINGS_ON_THE_CARD = (
    ("training", ("total_steps", "num_epochs", "batch_size", "accumulation_steps", "ttt_length", "precision", "seed")),
    ("optimizer", ("learning_rate", "lr_schedule", "warmup_ratio", "warmup_steps", "max_grad_norm", "max_grad_value")),
    ("data", ("chat_template", "max_length", "system_prompt")),
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
                   "chat_template.jinja", "vocab.json", "merges.txt", "generation_config.json")  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What the card tells besides the draft's own config.json.

    target: hub name or directory of the target, as users will launch it. evaluation: json of
    `evaluate_draft.py --save-results`; decoding: json of `compare_generation.py --output`.
    """

    target: str
    evaluation: Path | None = None
    decoding: Path | None = None
    license: str | None = None


def write_bundle(
    exported: Path, bundle_dir: Path, facts: CardFacts, tokenizer_from: Path | None = None, overwrite: bool = False
) -> Path:
    """Make `bundle_dir` from an exported draft directory; it appears complete or not at all.

    Raises ConfigError when it exists or the tokenizer's directory holds none, DataError for unreadable results.
    """
    if bundle_dir.exists() and not overwrite:
        raise ConfigError(f"bundle {bundle_dir}: exists already; give another directory, or --overwrite")
    evaluation, decoding = (None if path is None else read_json(path) for path in (facts.evaluation, facts.decoding))
    with user_errors(bundle_dir), atomic_directory(bundle_dir) as partial:
        shutil.copytree(exported, partial, dirs_exist_ok=True)
        config = read_json(exported / "config.json")
        run = config.get("specforge_lite") or {}
        config["specforge_lite"] = without_paths(run)
        write_json(partial / "config.json", config)
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, partial)
        card = model_card(bundle_dir.name, config, facts, evaluation, decoding)
        (partial / "README.md").write_text(card, encoding="utf-8")
    return bundle_dir


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the tokenizer files of a target directory."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if "tokenizer.json" not in found and "tokenizer.model" not in found:
        raise ConfigError(f"{source}: no tokenizer.json or tokenizer.model to take along")
    for name in found:
        shutil.copyfile(source / name, destination / name)


def without_paths(value: Any) -> Any:
    """The same JSON value with every absolute or nested local path cut to its last part. Hub names stay."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and "://" not in value and (os.path.isabs(value) or value.count("/") > 1):
        return PurePath(value).name
    return value


def model_card(
    name: str,
    config: dict[str, Any],
    facts: CardFacts,
    evaluation: dict[str, Any] | None,
    decoding: dict[str, Any] | None,
) -> str:
    """The README.md of a draft, in the form that the hub reads."""
    target = without_paths(facts.target)
    options = ServingOptions("vllm", target, name)
    algorithm = SERVING_ENGINES["vllm"].draft_algorithms[config["architectures"][0]]
    environment = Environment(
        loader=PackageLoader("specforge_lite", "assets"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("model_card.md.j2").render(
        name=name,
        target=target,
        algorithm=algorithm,
        kind={"eagle3": "EAGLE-3", "eagle": "EAGLE-1", "dspark": "DSpark", "dflash": "DFlash"}[algorithm],
        license=facts.license,
        commands=launch_commands(options, config),
        evaluation=evaluation,
        decoding=decoding,
        training=_training_rows(config.get("specforge_lite") or {}),
    )


STARTS = {"sglang": "python -m sglang.launch_server --model-path", "vllm": "vllm serve"}


def launch_commands(options: ServingOptions, draft: dict[str, Any], temperature: float = 1.0) -> str:
    """The commands of both engines, on a GPU. options: target and draft; draft: its config.json, which says how many
    tokens a block draft drafts. temperature: above 0 the draft's tokens are drawn where the engine can draw them."""
    steps = block_length(draft) or NUM_DRAFT_TOKENS
    asked = replace(options, num_steps=steps, num_draft_tokens=steps + 1, temperature=temperature)
    lines = [
        f"{start} {options.model_path} {shlex.join(SERVING_ENGINES[name].speculative_words(asked, draft))}"
        for name, start in STARTS.items()
    ]
    return "```bash\n" + "\n\n".join(lines).replace(" --", " \\\n  --") + "\n```"


def _training_rows(run: dict[str, Any]) -> list[tuple[str, Any]]:
    """How the draft was trained, from the run's own record."""
    settings, provenance = run.get("config") or {}, run.get("provenance") or {}
    rows = [("steps", run.get("step")), ("data", (settings.get("data") or {}).get("train_data_path"))]
    for section, keys in SETTINGS_ON_THE_CARD:
        rows += [(key.replace("_", " "), (settings.get(section) or {}).get(key)) for key in keys]
    rows += (provenance.get("packages") or {}).items()
    commit = (provenance.get("git") or {}).get("commit")
    rows += [("specforge_lite", f"{run.get('version')}{f' ({commit[:12]})' if commit else ''}")]
    return [(key, value) for key, value in rows if value is not None]
