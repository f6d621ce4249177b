"""What must never happen whatever the input says: code from outside, shells, secrets on disk, open ports."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specforge_lite.core.settings import Section
from tests.script_runner import ROOT, end_of_script, load_script
from tests.training_runs import Run, train

SOURCES = [
    path
    for folder in ("specforge_lite", "scripts", "benchmarks", "engine_envs")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pickle.load", "pickle.loads",
    "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "eval", "exec", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
# Methods of opened archives that write where the archive says.
ARCHIVE_METHODS = {"extractall", "extract"}


def name_of(node: ast.AST) -> str:
    """`a.b.c` of a call's function; empty for what is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = name_of(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def dangers(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) of every call that would run, unpickle or unpack what it is given."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN_CALLS:
            yield node.lineno, name
        if isinstance(node.func, ast.Attribute) and node.func.attr in ARCHIVE_METHODS:
            yield node.lineno, node.func.attr
        if name == "torch.load" and getattr(given.get("weights_only"), "value", None) is not True:
            yield node.lineno, "torch.load without weights_only=True"
        if name in ("np.load", "numpy.load") and getattr(given.get("allow_pickle"), "value", False) is not False:
            yield node.lineno, "numpy.load with allow_pickle"
        if "shell" in given and getattr(given["shell"], "value", True) is not False:
            yield node.lineno, "shell=True"
        if getattr(given.get("trust_remote_code"), "value", False) is True:
            yield node.lineno, "trust_remote_code=True"


def test_no_source_unpickles_unpacks_or_builds_shell_lines() -> None:
    assert len(SOURCES) > 150
    found = [f"{path.relative_to(ROOT)}:{line}: {what}" for path in SOURCES for line, what in dangers(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.system('ls ' + x)",
        "subprocess.run(x, shell=True)",
        "subprocess.run(x, shell=flag)",
        "pickle.loads(b)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "eval(x)",
        "tarfile.open(f).extractall(d)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "tempfile.mktemp()",
    ],
)
def test_the_scan_would_see_it(source: str) -> None:
    assert len(list(dangers(source))) == 1


def sections(config_class: type[Section]) -> Iterator[type[Section]]:
    yield config_class
    for info in config_class.model_fields.values():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from sections(info.annotation)


def test_remote_code_is_off_and_hosts_are_loopback_in_every_script() -> None:
    checked = set()
    scripts = [load_script(path.stem) for path in sorted((ROOT / "scripts").glob("*.py"))]
    for module in {sys.modules[script.main.__module__] for script in scripts}:
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, Section) and value is not Section):
                continue
            for section in sections(value):
                for name, info in section.model_fields.items():
                    if name == "trust_remote_code":
                        assert info.default is False, f"{module.__name__}: {section.__name__}"
                        checked.add(name)
                    if name == "host":
                        assert info.default == "127.0.0.1", f"{module.__name__}: {section.__name__}"
                        checked.add(name)
    assert checked == {"trust_remote_code", "host"}


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_came_with_a_model_is_not_run(tmp_path: Path, tiny_target: Path, capsys: Any) -> None:
    target, mark = tmp_path / "target", tmp_path / "executed"
    target.mkdir()
    for file in tiny_target.iterdir():
        if file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((tiny_target / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (target / "config.json").write_text(json.dumps(config | own))
    (target / "own.py").write_text(CODE.format(mark=str(mark)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "response": "a"}\n')
    for script, words in {
        "chat": ["--prompt", "hi"],
        "verify_target": ["--engines"],
        "build_eagle3_dataset_cache": ["--train-data-path", str(rows), "--cache-dir", str(tmp_path / "cache")],
        "train_eagle3_online": [
            "--target-backend", "hf", "--train-data-path", str(rows), "--output-dir", str(tmp_path / "run"),
            "--cache-dir", str(tmp_path / "cache"),
        ],
    }.items():  # fmt: skip
        code, error = end_of_script(script, ["--target-model-path", str(target), *words], capsys)
        assert code == 2, script
        assert not mark.exists(), script
        assert script == "verify_target" or "--trust-remote-code" in error, (script, error)


SECRETS = {
    "HF_TOKEN": "hf_" + "Abcd1234" * 4,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "OPENAI_API_KEY": "sk-" + "Zyxw9876" * 4,
    "HUB_PASSWORD": "correct-horse-battery",
}


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Neither from the environment, nor from the command line, nor from the message of an error."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "sys.argv", ["train.py", "--hub-token", SECRETS["HF_TOKEN"], f"wandb_key={SECRETS['WANDB_API_KEY']}"]
    )
    run = Run(tmp_path, settings={"logging": {"log_file": str(tmp_path / "log.jsonl")}, "training": {"total_steps": 2}})
    train(run)

    def fail(trainer: Any) -> None:
        def train_step(batches: Any) -> None:
            raise RuntimeError(f"401 for https://me:{SECRETS['OPENAI_API_KEY']}@hub, Bearer {SECRETS['HF_TOKEN']}")

        trainer.train_step = train_step

    longer = Run(
        tmp_path, settings={"training": {"total_steps": 4}, "logging": {"log_file": str(tmp_path / "log.jsonl")}}
    )
    with pytest.raises(RuntimeError):
        train(longer, fail)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{name} is in {path.relative_to(tmp_path)}"
    shown = capsys.readouterr()
    assert not [name for name, value in SECRETS.items() if value in shown.out + shown.err]
