"""Config sections as frozen pydantic models; every key of a YAML file is also a flag, and all mistakes are told
at once.

A script's config is a `Section` whose fields are `Section`s (YAML sections) or plain values. Leaf names are unique
over all sections, so `--learning-rate` needs no prefix and YAML may also give leaves at the top level.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.log import USER_ERROR_EXIT_CODE, is_main_rank


class Section(BaseModel):
    """Frozen, refuses unknown keys, and does not accept NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


ConfigT = TypeVar("ConfigT", bound=Section)


def parse_config(
    config_class: type[ConfigT], argv: list[str] | None = None, description: str = "", positional: str = ""
) -> ConfigT:
    """Build a config from `--config FILE.yaml` and flags (flags win). A first word that is no flag is the value of
    `positional`. Under torchrun only rank 0 raises; the others exit.

    Dashes and underscores are the same in flag names; abbreviations are refused. Field metadata
    `json_schema_extra={"flags": ["--mem-fraction-static"]}` adds synonyms.

    Raises ConfigError naming every unknown flag, unknown key and bad value at once.
    """
    try:
        return _parse(config_class, list(sys.argv[1:] if argv is None else argv), description, positional)
    except ConfigError:
        if is_main_rank():
            raise
        sys.exit(USER_ERROR_EXIT_CODE)


def _parse(config_class: type[ConfigT], argv: list[str], description: str, positional: str) -> ConfigT:
    if positional and argv and not argv[0].startswith("-"):
        argv.insert(0, positional)
    leaves = leaf_fields(config_class)
    parser = build_parser(config_class, leaves, description)
    argv = [_dashed(word) for word in argv]
    problems: list[str] = []
    namespace = _parse_flags(parser, argv, problems)
    values: dict[str, Any] = {}
    config_path = namespace.pop("__config__", None)
    if config_path:
        _merge_yaml(config_class, leaves, Path(config_path), values, problems)
    for name, raw in namespace.items():
        _assign(values, leaves[name][0], name, raw)
    for name, info in config_class.model_fields.items():  # a missing section is told by the keys it requires
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            values.setdefault(name, {})
    config: ConfigT | None = None
    try:
        config = config_class.model_validate(values)
    except ValidationError as error:
        problems += [_describe(config_class, leaves, item) for item in error.errors()]
    if problems:
        raise ConfigError(
            problems[0] if len(problems) == 1 else f"{len(problems)} mistakes:\n  " + "\n  ".join(problems)
        )
    assert config is not None
    return config


def leaf_fields(config_class: type[Section]) -> dict[str, tuple[tuple[str, ...], FieldInfo]]:
    """Map leaf name -> (section path, field). Two sections must not share a leaf name."""
    leaves: dict[str, tuple[tuple[str, ...], FieldInfo]] = {}
    for name, info in config_class.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            for leaf, (path, leaf_info) in leaf_fields(info.annotation).items():
                assert leaf not in leaves, f"{leaf} is in two sections of {config_class.__name__}"
                leaves[leaf] = ((name, *path), leaf_info)
        else:
            assert name not in leaves, f"{name} is in two sections of {config_class.__name__}"
            leaves[name] = ((), info)
    return leaves


def build_parser(
    config_class: type[Section], leaves: dict[str, tuple[tuple[str, ...], FieldInfo]], description: str
) -> argparse.ArgumentParser:
    """One flag per leaf; values stay strings, pydantic converts them and words the errors."""
    parser = argparse.ArgumentParser(
        description=description or config_class.__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", dest="__config__", metavar="FILE.yaml", help="YAML file; flags override it")
    groups: dict[tuple[str, ...], Any] = {}
    for name, (path, info) in leaves.items():
        group = groups.setdefault(path, parser.add_argument_group(".".join(path) or "options"))
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        flags = [_dashed("--" + name), *typing.cast(list[str], extra.get("flags", []))]
        help_text = (info.description or "").replace("%", "%%")
        if not info.is_required() and info.default not in (None, "", ()):
            help_text += f" (default: {info.default})"
        kind = _plain_type(info.annotation)
        if kind is bool:
            group.add_argument(*flags, dest=name, nargs="?", const=True, metavar="BOOL", help=help_text)
            negated = ["--no-" + flag[2:] for flag in flags]
            group.add_argument(*negated, dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
        elif kind is tuple or kind is list:
            group.add_argument(*flags, dest=name, nargs="*", action="extend", metavar="X", help=help_text)
        else:
            group.add_argument(*flags, dest=name, metavar=_metavar(info), help=help_text)
    return parser


def _parse_flags(parser: argparse.ArgumentParser, argv: list[str], problems: list[str]) -> dict[str, Any]:
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None
    known = [flag for action in parser._actions for flag in action.option_strings]
    for word in unknown:
        if word.startswith("--"):
            flag = word.split("=", 1)[0]
            problems.append(
                f"{flag}: unknown flag{suggest(flag, known) if suggest(flag, known).startswith('; did') else ''}"
            )
        elif not any(p.endswith("flag") or "unknown flag" in p for p in problems):
            problems.append(f"unexpected argument '{word}'")
    return dict(vars(namespace))


def _merge_yaml(
    config_class: type[Section],
    leaves: dict[str, tuple[tuple[str, ...], FieldInfo]],
    path: Path,
    values: dict[str, Any],
    problems: list[str],
) -> None:
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
    if loaded is None:
        return
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(loaded).__name__}")
    for key, value in loaded.items():
        section = config_class.model_fields.get(key) if isinstance(key, str) else None
        if section is not None and _is_section(section) and not isinstance(value, dict):
            problems.append(f"{key}: expected a mapping of keys to values, found {value!r}")
        elif key in leaves and leaves[key][0]:
            _assign(values, leaves[key][0], key, value)
        elif isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key].update(value)
        else:
            values[str(key)] = dict(value) if isinstance(value, dict) else value


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


def _assign(values: dict[str, Any], path: tuple[str, ...], name: str, raw: Any) -> None:
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):  # the YAML gave a scalar for a section; pydantic will say so
            return
    values[name] = None if isinstance(raw, str) and raw.lower() in ("none", "null") else raw


def _describe(config_class: type[Section], leaves: dict[str, tuple[tuple[str, ...], FieldInfo]], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        names = list(leaves) + list(config_class.model_fields)
        hint = suggest(location[-1], names)
        return f"{key}: unknown key{hint if hint.startswith('; did') else ''}"
    if item["type"] == "missing":
        return f"{key}: required (flag {_dashed('--' + location[-1])})"
    if item["type"] == "literal_error":
        expected = [word.strip(" '") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = suggest(str(item["input"]), expected)
        known = f"; known: {', '.join(expected)}"
        return f"{key}: unknown value '{item['input']}'{hint if hint != known else ''}{known}"
    message = item["msg"].removeprefix("Value error, ")
    shown = f" (found {item['input']!r})" if item["type"] not in ("value_error", "assertion_error") else ""
    return f"{key}: {message}{shown}" if key else message


def _dashed(word: str) -> str:
    """`--ttt_length=7` -> `--ttt-length=7`; the value part is left alone."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _plain_type(annotation: Any) -> Any:
    """The type a flag's words make up: bool, list/tuple, or anything else; `X | None` counts as X."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return _plain_type(inner[0]) if len(inner) == 1 else None
    return origin or annotation


def _metavar(info: FieldInfo) -> str:
    args = typing.get_args(info.annotation)
    if typing.get_origin(info.annotation) is typing.Literal:
        return "{" + ",".join(str(arg) for arg in args) + "}"
    name = getattr(_plain_type(info.annotation), "__name__", "value")
    return {"int": "N", "float": "X", "Path": "PATH", "str": "TEXT"}.get(name, "VALUE")
