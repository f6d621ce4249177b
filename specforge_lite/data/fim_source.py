"""Source code -> FIM rows: whole function bodies, single statements and random spans of lines of Python files, random
spans of lines of any other language. Holes are whole lines, as an editor asks for them."""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specforge_lite.core.errors import DataError
from specforge_lite.data.fim import FimRow
from specforge_lite.data.reading import BadRow

MAX_FILE_BYTES = 1 << 20
EXCLUDED_DIRS = ("site-packages", "node_modules")  # what others wrote, below somebody's own code
LANGUAGES = {
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".java", ".js", ".jsx", ".ts", ".tsx", ".go",
    ".rs", ".rb", ".php", ".cs", ".swift", ".kt", ".scala", ".lua", ".sh", ".sql", ".r", ".jl", ".hs", ".ml", ".ex",
}  # fmt: skip


@dataclass(frozen=True)
class FimSourceOptions:
    """How rows are made. rows_per_file: at most so many holes; max_context_chars: of prefix and of suffix, cut at line
    ends; max_span_lines: of a random span; exclude_dirs: names of directories that are passed over."""

    rows_per_file: int = 4
    max_context_chars: int = 6000
    max_span_lines: int = 12
    seed: int = 0
    exclude_dirs: tuple[str, ...] = EXCLUDED_DIRS


def fim_rows(source_dir: Path, options: FimSourceOptions) -> Iterator[FimRow | BadRow]:
    """Rows of all source files below a directory, in the order of their names; the same for the same files and seed.

    A file that cannot be read or parsed comes as a `BadRow` whose detail starts with its name. Hidden files and
    directories are passed over, and `exclude_dirs`. Raises DataError if the directory is missing or has no source file.
    """
    if not source_dir.is_dir():
        raise DataError(f"{source_dir}: no such directory; expected --source-dir with source code")
    files = sorted(
        path
        for path in source_dir.rglob("*")
        if path.suffix in LANGUAGES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source_dir).parts)
        and not set(options.exclude_dirs) & set(path.relative_to(source_dir).parts[:-1])
    )
    if not files:
        raise DataError(f"{source_dir}: no source files; known endings: {' '.join(sorted(LANGUAGES))}")
    for path in files:
        name = path.relative_to(source_dir).as_posix()
        text = _read(path, name)
        if isinstance(text, BadRow):
            yield text
        else:
            yield from file_rows(name, text, options)


def _read(path: Path, name: str) -> str | BadRow:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return BadRow(1, "file-too-large", f"{name}: more than {MAX_FILE_BYTES >> 10} KiB")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        return BadRow(1, "unreadable-file", f"{name}: {error.strerror or error}")
    except UnicodeDecodeError as error:
        return BadRow(1, "not-utf8", f"{name}: byte at {error.start} is not UTF-8")
    return text.replace("\r\n", "\n")


def file_rows(name: str, text: str, options: FimSourceOptions) -> Iterator[FimRow | BadRow]:
    """The rows of one file: of all its holes at most `rows_per_file`, drawn by (seed, name)."""
    chooser = random.Random(f"{options.seed}:{name}")
    lines = text.splitlines(keepends=True)
    spans: set[tuple[int, int]] = set()
    if name.endswith((".py", ".pyi")):
        try:
            spans |= python_spans(text)
        except (SyntaxError, ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None) or 1
            yield BadRow(line, "syntax-error", f"{name}:{line}: {getattr(error, 'msg', None) or error}")
            return
    spans |= _random_spans(lines, chooser, max(1, options.rows_per_file // 2), options.max_span_lines)
    whole = sorted(span for span in spans if "".join(lines[slice(*span)]).strip())
    if not whole:
        yield BadRow(1, "empty-middle", f"{name}: no line to cut out")
        return
    for start, end in sorted(chooser.sample(whole, min(options.rows_per_file, len(whole)))):
        yield FimRow(
            id=f"{name}:{start + 1}-{end}",
            prefix=_tail("".join(lines[:start]), options.max_context_chars),
            middle="".join(lines[start:end]),
            suffix=_head("".join(lines[end:]), options.max_context_chars),
            source=name,
        )


def python_spans(text: str) -> set[tuple[int, int]]:
    """Line spans [start, end), 0-based, of function bodies (docstring left in the prefix) and of single statements
    inside functions. Raises SyntaxError."""
    with warnings.catch_warnings():  # invalid escapes in other people's code
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    spans: set[tuple[int, int]] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
        if not body or body[0].lineno == node.lineno:
            continue
        spans.add((body[0].lineno - 1, body[-1].end_lineno or body[-1].lineno))
        spans |= {(statement.lineno - 1, statement.end_lineno or statement.lineno) for statement in body}
    return spans


def _random_spans(lines: list[str], chooser: random.Random, count: int, max_lines: int) -> set[tuple[int, int]]:
    """Up to `count` spans [start, end) of 1..max_lines lines that start and end on a line with text."""
    filled = [number for number, line in enumerate(lines) if line.strip()]
    spans = set()
    for _ in range(count if filled else 0):
        first = chooser.randrange(len(filled))
        last = min(first + chooser.randrange(max_lines), len(filled) - 1)
        if filled[last] - filled[first] < 2 * max_lines:  # not across a desert of blank lines
            spans.add((filled[first], filled[last] + 1))
    return spans


def _tail(text: str, limit: int) -> str:
    """The last `limit` characters, from the start of a line where there is one."""
    if len(text) <= limit:
        return text
    cut = text[len(text) - limit :]
    return cut[cut.find("\n") + 1 :] if "\n" in cut[:-1] else cut


def _head(text: str, limit: int) -> str:
    """The first `limit` characters, up to the end of a line where there is one."""
    if len(text) <= limit:
        return text
    cut = text[:limit]
    return cut[: cut.rfind("\n") + 1] or cut
