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
    exclude_dirs: tuple[str, ...] = ("site-packages", "node_modules")  # what others wrote, below somebody's own code


def fim_rows(source_dir: Path, options: FimSourceOptions) -> Iterator[FimRow | BadRow]:
    """Rows of all source files below a directory, in the order of their names; the same for the same files and seed.

    A file that cannot be read or parsed comes as a `BadRow` whose detail starts with its name. Hidden files and
    directories are passed over, and `exclude_dirs`. Raises DataError if the directory is missing or has no source file.
    """
    if not source_dir.is_dir():
        raise DataError(f"{source_dir}: no such directory; expected --source-dir with source code")
    found = False
    for path in sorted(path for path in source_dir.rglob("*") if path.suffix in LANGUAGES and path.is_file()):
        parts = path.relative_to(source_dir).parts
        if any(part.startswith(".") for part in parts) or set(options.exclude_dirs) & set(parts[:-1]):
            continue
        found, name = True, "/".join(parts)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                yield BadRow(1, "file-too-large", f"{name}: more than {MAX_FILE_BYTES >> 10} KiB")
                continue
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            yield BadRow(1, "unreadable-file", f"{name}: {error.strerror or error}")
        except UnicodeDecodeError as error:
            yield BadRow(1, "not-utf8", f"{name}: byte at {error.start} is not UTF-8")
        else:
            yield from file_rows(name, text.replace("\r\n", "\n"), options)
    if not found:
        raise DataError(f"{source_dir}: no source files; known endings: {' '.join(sorted(LANGUAGES))}")


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
    limit = options.max_context_chars
    for start, end in sorted(chooser.sample(whole, min(options.rows_per_file, len(whole)))):
        prefix, middle, suffix = ("".join(part) for part in (lines[:start], lines[start:end], lines[end:]))
        if len(prefix) > limit:  # from the start of a line where there is one
            cut = prefix[-limit:]
            prefix = cut[cut.find("\n") + 1 :] if "\n" in cut[:-1] else cut
        if len(suffix) > limit:  # up to the end of a line where there is one
            suffix = suffix[: suffix.rfind("\n", 0, limit) + 1] or suffix[:limit]
        yield FimRow(f"{name}:{start + 1}-{end}", prefix, middle, suffix, name)


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
        bounds = [(statement.lineno - 1, statement.end_lineno or statement.lineno) for statement in body]
        spans |= {(bounds[0][0], bounds[-1][1]), *bounds}
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
