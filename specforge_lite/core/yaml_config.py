"""`--config FILE.yaml`: sections of keys, or keys at the top level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.settings import Parse, assign


def merge_yaml(parse: Parse, path: Path, values: dict[str, Any]) -> None:
    """Add the values of `--config FILE.yaml`; its mistakes go to `parse.problems`. Raises ConfigError for a file that
    cannot be read."""
    parse.source = f"{path}: "
    for key, value in _read_yaml(path).items():
        if key not in parse.sections:
            leaf = parse.keys.get(key, str(key))
            assign(values, parse.leaves[leaf][0] if leaf in parse.leaves else (), leaf, value)
        elif isinstance(value, dict):
            inner = {_leaf_of(parse, key, name): item for name, item in value.items()}
            values.setdefault(key, {}).update(inner)
        else:
            parse.problems.append(f"{path}: {key}: expected a mapping of keys to values, found {value!r}")


def _leaf_of(parse: Parse, section: str, key: Any) -> Any:
    """The field that a YAML key inside a section means."""
    leaf = parse.keys.get(key, "")
    return leaf if leaf and parse.leaves[leaf][0] == (section,) else key


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested without end") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(loaded).__name__}")
    return loaded or {}
