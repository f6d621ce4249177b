"""Prompts of benchmarks/real_target.py: first questions of files, and functions of the standard library to write.

    texts = training_prompts([Path("gsm8k_train.jsonl"), Path("alpaca.json")], num_functions=1000)

A question is the first message of the user; rows with the same one count once. The functions give prompts of code
without a download: signature and docstring, the body is what the target writes.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from specforge_lite.benchmark.prompts import BenchmarkRequest, load_prompts

DOCSTRING_LENGTHS = range(60, 601)  # characters; shorter ones do not say what to write
FORMS = (
    "Complete this Python function.\n\n```python\n{code}\n```",
    "Write the body of the function `{name}`.\n\n```python\n{code}\n```",
    "Implement this in Python:\n\n{code}",
)


def training_prompts(files: Sequence[Path], num_functions: int) -> list[str]:
    """Texts in the order of the files, then the functions; GSM8K's shipped questions where no file is given.
    Raises DataError."""
    sources = [BenchmarkRequest(str(path), None) for path in files] or [BenchmarkRequest("gsm8k", None)]
    questions = [
        next(str(message["content"]) for message in chain(*prompt.steps) if message["role"] == "user")
        for source in sources
        for prompt in load_prompts(source)
    ]
    functions = list(dict.fromkeys(functions_to_write())) if num_functions else []
    random.Random(0).shuffle(functions)
    return list(dict.fromkeys([*questions, *functions[:num_functions]]))


def functions_to_write() -> Iterator[str]:
    """A prompt for each documented public function of the interpreter's standard library, in the order of its files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # files that test the parser
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text and len(text) in DOCSTRING_LENGTHS:
                    bare = ast.FunctionDef(node.name, node.args, [node.body[0]], [], node.returns)
                    code = ast.unparse(ast.fix_missing_locations(bare))
                    yield FORMS[len(code) % len(FORMS)].format(name=node.name, code=code)


def benchmark_texts(benchmark_list: Sequence[str], data_dir: Path | None) -> dict[str, list[str]]:
    """First turns of each benchmark's prompts; entries as those of `--benchmark-list`."""
    requests = [BenchmarkRequest.parse(text) for text in benchmark_list]
    return {r.label: [prompt.turns[0] for prompt in load_prompts(r, data_dir)] for r in requests}
