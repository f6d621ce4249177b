"""Flags and YAML: every mistake at once, synonyms, dashes and underscores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from specforge_lite import __version__
from specforge_lite.cli import COMMANDS, main
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, parse_config
from tests.script_runner import ROOT, load_script


class Example(Section):
    """A script's config."""

    target: TargetSection
    data: DataSection = DataSection()


def test_dashes_underscores_synonyms_and_lists() -> None:
    argv = ["--target_model-path", "m", "--mem-fraction-static=0.4", "--target-url", "a", "b", "--trust-remote-code"]
    config = parse_config(Example, argv)
    assert config.target.target_model_path == "m"
    assert config.target.mem_frac == 0.4
    assert config.target.target_url == ("a", "b")
    assert config.target.trust_remote_code is True
    assert parse_config(Example, ["--basepath", "m", "--no-trust-remote-code"]).target.trust_remote_code is False


def test_all_mistakes_at_once_with_suggestions() -> None:
    argv = ["--target-backend", "sglan", "--max-lenght", "3", "--tp-size", "0", "--mem-frac", "x"]
    with pytest.raises(ConfigError) as caught:
        parse_config(Example, argv)
    text = str(caught.value)
    assert "--max-lenght: unknown flag; did you mean '--max-length'?" in text
    assert "target.target_model_path: required (flag --target-model-path)" in text
    assert "target.target_backend: unknown value 'sglan'; did you mean 'sglang'?" in text
    assert "target.tp_size" in text
    assert "(found '0')" in text
    assert "target.mem_frac" in text


def test_abbreviations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-len: unknown flag; did you mean '--max-length'\?"):
        parse_config(Example, ["--target-model-path", "m", "--max-len", "3"])


def test_yaml_sections_or_bare_leaves_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("target:\n  target_model_path: m\n  tp_size: 2\nmax_length: 512\n")
    config = parse_config(Example, ["--config", str(file), "--tp-size", "4"])
    assert (config.target.tp_size, config.data.max_length) == (4, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("target: {target_model_path: m}\ndata: {max_lenght: 3}\n", r"data.max_lenght: unknown key; did you mean"),
        ("target: [1\n", r"run.yaml:2: not valid YAML"),
        ("- a\n", r"expected a mapping of keys to values, found list"),
        ("target: 3\n", r"target: .*found 3"),
    ],
)  # fmt: skip
def test_yaml_mistakes_name_their_place(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_config(Example, ["--config", str(file)])


def test_missing_yaml_file() -> None:
    with pytest.raises(ConfigError, match=r"--config nowhere.yaml: No such file"):
        parse_config(Example, ["--config", "nowhere.yaml"])


def test_none_clears_an_optional_value(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("target: {target_model_path: m, mem_frac: 0.5}\n")
    assert parse_config(Example, ["--config", str(file), "--mem-frac", "none"]).target.mem_frac is None


def test_a_flag_without_its_value() -> None:
    with pytest.raises(ConfigError, match="expected one argument"):
        parse_config(Example, ["--target-model-path"])


# ------------------------------------------------------------------------------------------------- commands and scripts

HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors", "aiohttp", "matplotlib", "huggingface_hub")
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
HELP = f"""
import contextlib, io, runpy, sys
from pathlib import Path
for words in {{commands!r}}:
    sys.argv = [*words, "--help"]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_path(words[0], run_name="__main__")
    assert "usage: " in shown.getvalue(), words
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (words, loaded)
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_help_loads_nothing_heavy() -> None:
    """Import time is what makes --help slow; modules can be counted on a machine that is busy."""
    scripts = [[f"scripts/{name}.py"] for name in SCRIPTS] + [["benchmarks/bench_model_speedup.py"]]
    commands = [["specforge_lite/__main__.py", *name.split()] for name in COMMANDS] + [["specforge_lite/__main__.py"]]
    done = run_python(HELP.format(commands=scripts + commands))
    assert done.returncode == 0, done.stderr[-600:]


def test_each_script_is_a_command_and_each_command_a_script() -> None:
    called = {
        (load_script(name).main.__module__.rsplit(".", 1)[1], load_script(name).main.__name__)
        for name in SCRIPTS
        if len((ROOT / "scripts" / f"{name}.py").read_text().splitlines()) < 10
    }
    assert called | {("bench", "main")} == {tuple(place.split(":")) for place, _ in COMMANDS.values()}


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        ([], 0, "evaluate checkpoints"),
        (["--version"], 0, __version__),
        (["trian"], 2, "error: unknown command 'trian'; did you mean 'train'?"),
        (["plan", "speculation", "--results", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["check", "nowhere"], 2, "no such directory"),
    ],
)
def test_the_console_command(
    words: list[str], code: int, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["specforge-lite", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert shown in "".join(capsys.readouterr())
