"""Config sections as frozen pydantic models; every key of a YAML file is also a flag, and all mistakes are reported
together.

A command's config is a `Section` whose fields are `Section`s (YAML sections) or plain values. Leaf names are unique
over all sections, so `--learning-rate` needs no prefix and YAML may also give leaves at the top level.
"""

from __future__ import annotations

import argparse
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from specforge_lite.core.errors import ConfigError
from specforge_lite.core.log import USER_ERROR_EXIT_CODE, is_main_rank

# Stands for a required text that is missing while the rest is checked; no message that names it is shown.
MISSING = "<missing>"


class Section(BaseModel):
    """Frozen, refuses unknown keys, and does not accept NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


def flag(default: Any, description: str, *synonyms: str, **limits: Any) -> Any:
    """A leaf of a section. default: `...` where it is required; synonyms: other names of its flag, `--bs`; limits: of
    pydantic, such as ge=1."""
    return Field(default, description=description, json_schema_extra={"flags": list(synonyms)}, **limits)


ConfigT = TypeVar("ConfigT", bound=Section)
Leaves = dict[str, tuple[tuple[str, ...], FieldInfo]]


def parse_config(
    config_class: type[ConfigT], argv: list[str] | None = None, description: str = "", positional: str = ""
) -> ConfigT:
    """Build a config from `--config FILE.yaml` and flags (flags win). A first word that is no flag is the value of
    `positional`. Under torchrun only rank 0 raises; the others exit.

    Dashes and underscores are the same in flag names; abbreviations are refused. Synonyms (`flag`) are YAML keys as
    well.

    Raises ConfigError naming every unknown flag, unknown key and bad value at once, each as the user gave it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if positional and words and not words[0].startswith("-"):
        words.insert(0, positional)
    try:
        return Parse(config_class, description).run(words)
    except ConfigError:
        if is_main_rank():
            raise
        sys.exit(USER_ERROR_EXIT_CODE)


def leaf_fields(config_class: type[Section]) -> Leaves:
    """Map leaf name -> (section path, field). Two sections must not share a leaf name."""
    leaves: Leaves = {}
    for name, info in config_class.model_fields.items():
        if _is_section(info):
            for leaf, (path, leaf_info) in leaf_fields(typing.cast(type[Section], info.annotation)).items():
                assert leaf not in leaves, f"{leaf} is in two sections of {config_class.__name__}"
                leaves[leaf] = ((name, *path), leaf_info)
        else:
            assert name not in leaves, f"{name} is in two sections of {config_class.__name__}"
            leaves[name] = ((), info)
    return leaves


def build_parser(config_class: type[Section], leaves: Leaves, description: str) -> argparse.ArgumentParser:
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
        flags = [dashed("--" + name), *_synonyms(info)]
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


class Parse:
    """One reading of a command line. keys: name or synonym -> leaf. typed: leaf -> the flag as the user wrote it.
    source: the YAML file, for its mistakes."""

    def __init__(self, config_class: type[Section], description: str) -> None:
        self.config_class, self.description = config_class, description
        self.leaves = leaf_fields(config_class)
        self.sections = {name for name, info in config_class.model_fields.items() if _is_section(info)}
        self.keys = {bare(flag): name for name, (_, info) in self.leaves.items() for flag in _synonyms(info)}
        self.keys |= {name: name for name in self.leaves}
        self.typed: dict[str, str] = {}
        self.problems: list[str] = []
        self.source = ""

    def run(self, argv: list[str]) -> Any:
        values: dict[str, Any] = {}
        given = self._parse_flags(argv)
        if path := given.pop("__config__", None):
            from specforge_lite.core.yaml_config import merge_yaml

            merge_yaml(self, Path(path), values)
        for name, raw in given.items():
            assign(values, self.leaves[name][0], name, raw)
        for name in self.sections:  # what is missing is reported by the keys that the section requires
            values.setdefault(name, {})
        config = self._validate(values)
        if self.problems:
            listed = list(dict.fromkeys(self.problems))
            raise ConfigError(listed[0] if len(listed) == 1 else "\n  ".join([f"{len(listed)} mistakes:", *listed]))
        return config

    def _parse_flags(self, argv: list[str]) -> dict[str, Any]:
        parser = build_parser(self.config_class, self.leaves, self.description)
        try:
            namespace, unknown = parser.parse_known_args([dashed(word) for word in argv])
        except argparse.ArgumentError as error:
            raise ConfigError(str(error)) from None
        actions = parser._option_string_actions
        as_typed = {dashed(flag): flag for flag in (word.partition("=")[0] for word in argv)}
        self.typed = {actions[flag].dest: typed for flag, typed in as_typed.items() if flag in actions}
        for word in unknown:
            if word.startswith("--"):
                from specforge_lite.core.mistakes import nearest

                flag = as_typed[word.partition("=")[0]]
                self.problems.append(f"{flag}: unknown flag{nearest(self, flag, [bare(known) for known in actions])}")
            elif not any("unknown flag" in problem for problem in self.problems):  # else it may be that flag's value
                self.problems.append(f"unexpected argument '{word}'")
        return dict(vars(namespace))

    def _validate(self, values: dict[str, Any]) -> Section | None:
        """The config; None where there are problems. Checks of combinations run only on values that are right by
        themselves, so the wrong ones are taken out and the rest is checked again."""
        for _ in range(4):
            try:
                return self.config_class.model_validate(values)
            except ConfigError as error:  # of a validator that reads a file
                self.problems.append(str(error))
                break
            except ValidationError as error:
                mistakes = error.errors()
            from specforge_lite.core.mistakes import describe, take_out

            for item in mistakes:
                self.problems += [text for text in describe(self, item) if MISSING not in text]
            if False in [take_out(values, item, self.leaves) for item in mistakes]:
                break
        return None


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


def assign(values: dict[str, Any], path: tuple[str, ...], name: str, raw: Any) -> None:
    """Put a leaf at its place among nested values; `none` and `null` are None."""
    for part in path:
        values = values.setdefault(part, {})
    values[name] = None if isinstance(raw, str) and raw.lower() in ("none", "null") else raw


def _synonyms(info: FieldInfo) -> list[str]:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return typing.cast(list[str], extra.get("flags", []))


def bare(flag: str) -> str:
    """`--ttt-length` -> `ttt_length`."""
    return flag.lstrip("-").replace("-", "_")


def dashed(word: str) -> str:
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
