"""Config sections as frozen pydantic models; every key of a YAML file is also a flag, and all mistakes are reported
together.

A command's config is a `Section` whose fields are `Section`s (YAML sections) or plain values. Leaf names are unique
over all sections, so `--learning-rate` needs no prefix and YAML may also give leaves at the top level.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from specforge_lite.core.errors import ConfigError, suggest
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
        return _Parse(config_class, description).run(words)
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
        flags = [_dashed("--" + name), *_synonyms(info)]
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


class _Parse:
    """One reading of a command line. keys: name or synonym -> leaf. typed: leaf -> the flag as the user wrote it.
    source: the YAML file, for its mistakes."""

    def __init__(self, config_class: type[Section], description: str) -> None:
        self.config_class, self.description = config_class, description
        self.leaves = leaf_fields(config_class)
        self.sections = {name for name, info in config_class.model_fields.items() if _is_section(info)}
        self.keys = {_bare(flag): name for name, (_, info) in self.leaves.items() for flag in _synonyms(info)}
        self.keys |= {name: name for name in self.leaves}
        self.typed: dict[str, str] = {}
        self.problems: list[str] = []
        self.source = ""

    def run(self, argv: list[str]) -> Any:
        values: dict[str, Any] = {}
        given = self._parse_flags(argv)
        if path := given.pop("__config__", None):
            self._merge_yaml(Path(path), values)
        for name, raw in given.items():
            _assign(values, self.leaves[name][0], name, raw)
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
            namespace, unknown = parser.parse_known_args([_dashed(word) for word in argv])
        except argparse.ArgumentError as error:
            raise ConfigError(str(error)) from None
        actions = parser._option_string_actions
        as_typed = {_dashed(flag): flag for flag in (word.partition("=")[0] for word in argv)}
        self.typed = {actions[flag].dest: typed for flag, typed in as_typed.items() if flag in actions}
        for word in unknown:
            if word.startswith("--"):
                flag = as_typed[word.partition("=")[0]]
                self.problems.append(f"{flag}: unknown flag{self._nearest(flag, [_bare(known) for known in actions])}")
            elif not any("unknown flag" in problem for problem in self.problems):  # else it may be that flag's value
                self.problems.append(f"unexpected argument '{word}'")
        return dict(vars(namespace))

    def _merge_yaml(self, path: Path, values: dict[str, Any]) -> None:
        self.source = f"{path}: "
        for key, value in _read_yaml(path).items():
            if key not in self.sections:
                leaf = self.keys.get(key, str(key))
                _assign(values, self.leaves[leaf][0] if leaf in self.leaves else (), leaf, value)
            elif isinstance(value, dict):
                inner = {self._leaf_of(key, name): item for name, item in value.items()}
                values.setdefault(key, {}).update(inner)
            else:
                self.problems.append(f"{path}: {key}: expected a mapping of keys to values, found {value!r}")

    def _leaf_of(self, section: str, key: Any) -> Any:
        """The field that a YAML key inside a section means."""
        leaf = self.keys.get(key, "")
        return leaf if leaf and self.leaves[leaf][0] == (section,) else key

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
            for item in mistakes:
                self.problems += [text for text in self._describe(item) if MISSING not in text]
            removed = [_take_out(values, item, self.leaves) for item in mistakes]
            if False in removed:
                break
        return None

    def _describe(self, item: Any) -> Iterator[str]:
        location = [str(part) for part in item["loc"]]
        leaf = next((part for part in location if part in self.leaves), "")
        typed = self.typed.get(leaf)
        key = typed or ".".join(location)
        place = key if typed or not self.source or not location else self.source + key
        if item["type"] == "extra_forbidden":
            yield f"{place}: unknown key{self._nearest(location[-1], [*self.keys, *self.config_class.model_fields])}"
        elif item["type"] == "missing":
            yield f"{key}: required (flag {_dashed('--' + location[-1])})"
        elif item["type"] == "literal_error":
            expected = [word.strip(" '") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            hint = suggest(str(item["input"]), expected)
            known = f"; known: {', '.join(expected)}"
            yield f"{place}: unknown value '{item['input']}'{hint if hint != known else ''}{known}"
        elif item["type"] in ("value_error", "assertion_error"):
            for line in item["msg"].removeprefix("Value error, ").split("\n"):
                message = self._as_typed(line.strip())
                yield f"{place}: {message}" if place and not message.startswith(place) else message
        else:
            yield f"{place}: {item['msg']} (found {item['input']!r})"

    def _as_typed(self, message: str) -> str:
        """Field names before the first colon become the flags that the user typed."""
        head, colon, rest = message.partition(":")
        for leaf, flag in self.typed.items():
            head = re.sub(rf"^{leaf}\b" if "_" not in leaf else rf"\b{leaf}\b", flag, head)
        return head + colon + rest

    def _nearest(self, name: str, known: Iterable[str]) -> str:
        """What an unknown name probably means: a name of another project, or one of ours mistyped or cut short."""
        bare, dashes = _bare(name), "--" if name.startswith("--") else ""
        names = {_bare(word) for word in known}
        if not dashes and bare in self.keys:  # a key in the wrong section
            return f"; did you mean '{'.'.join((*self.leaves[self.keys[bare]][0], self.keys[bare]))}'?"
        peer = peer_flags().get(bare.replace("_", "-"), ())
        if isinstance(peer, str):
            return f"; {peer}"
        found = [word for word in map(_bare, peer) if word in names][:1]
        found = found or difflib.get_close_matches(bare, sorted(names), n=1, cutoff=0.8)
        found = found or sorted((word for word in names if word.startswith(bare + "_")), key=len)[:1]
        return f"; did you mean '{_dashed(dashes + found[0]) if dashes else found[0]}'?" if found else ""


def peer_flags() -> dict[str, tuple[str, ...] | str]:
    """What flags of other projects are called here, or a note where no flag of ours is the same."""
    tables = yaml.safe_load((resources.files("specforge_lite.assets") / "peer_flags.yaml").read_text("utf-8"))
    ours = {peer: tuple(names.split()) for names, theirs in tables["flags"].items() for peer in theirs.split()}
    return ours | {peer: note for note, theirs in tables["notes"].items() for peer in theirs.split()}


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


def _take_out(values: dict[str, Any], item: Any, leaves: Leaves) -> bool:
    """Remove the value of a mistake, or put MISSING for what is missing; False where there is nothing to remove."""
    *path, name = [str(part) for part in item["loc"]] or [""]
    for depth, part in enumerate(item["loc"]):  # an item of a list: take the list out
        if part in leaves:
            path, name = [str(word) for word in item["loc"][:depth]], str(part)
    inner: Any = values
    for part in path:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        return False
    if item["type"] == "missing":
        inner[name] = MISSING
        return True
    found = name in inner
    inner.pop(name, None)
    return found


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, Section)


def _assign(values: dict[str, Any], path: tuple[str, ...], name: str, raw: Any) -> None:
    for part in path:
        values = values.setdefault(part, {})
    values[name] = None if isinstance(raw, str) and raw.lower() in ("none", "null") else raw


def _synonyms(info: FieldInfo) -> list[str]:
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    return typing.cast(list[str], extra.get("flags", []))


def _bare(flag: str) -> str:
    """`--ttt-length` -> `ttt_length`."""
    return flag.lstrip("-").replace("-", "_")


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
