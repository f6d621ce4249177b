"""Flags and YAML: every mistake at once, synonyms, dashes and underscores."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from specforge_lite import __version__
from specforge_lite.cli.commands import COMMANDS, main
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.mistakes import peer_flags
from specforge_lite.core.sections import DataSection, TargetSection
from specforge_lite.core.settings import Section, build_parser, leaf_fields, parse_config
from specforge_lite.training.eagle1 import Eagle1Config
from specforge_lite.training.settings import TrainConfig
from tests.script_runner import ROOT, load_script


def config_classes() -> Iterator[type[Section]]:
    """The config of every command."""
    for place, _ in COMMANDS.values():
        module = importlib.import_module(f"specforge_lite.cli.{place.split(':')[0]}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Section) and value.__name__.endswith("Config"):
                yield value


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
    assert "  --target-backend: unknown value 'sglan'; did you mean 'sglang'?" in text
    assert "  --tp-size: Input should be greater than or equal to 1 (found '0')" in text
    assert "  --mem-frac: " in text


def test_a_mistake_is_named_as_it_was_typed_and_all_kinds_are_in_one_report(tmp_path: Path) -> None:
    """Wrong values, impossible combinations and missing files together, with the synonyms that were used."""
    argv = ["--lr", "fast", "--bs=0", "--warmup_steps", "3", "--warmup-ratio", "0.1", "--testpath", "/no/where"]
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, [*argv, "--cpu-offload", "--output-dir", str(tmp_path)])
    lines = [line.strip() for line in str(caught.value).split("\n")]
    assert lines[0] == f"{len(lines) - 1} mistakes:"
    assert len(set(lines)) == len(lines)
    for start in (
        "--lr: Input should be a valid number",
        "--bs: Input should be greater than or equal to 1 (found '0')",
        "--warmup_steps and --warmup-ratio: give one",
        "--testpath: no such file: /no/where",
        "--cpu-offload: only with --sharding fsdp2",
        "target.target_model_path: required (flag --target-model-path)",
        "train_data_path: required (flag --train-data-path)",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)
    assert "learning_rate" not in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--grad_checkpointing", "--grad_checkpointing: unknown flag; did you mean '--activation-checkpointing'?"),
        ("--per_device_train_batch_size", "did you mean '--batch-size'?"),
        ("--verifier-name-or-path", "did you mean '--target-model-path'?"),
        ("--epochs", "did you mean '--num-epochs'?"),
        ("--save_steps", "did you mean '--save-interval'?"),
        ("--scheduler-warmup-steps", "did you mean '--warmup-steps'?"),
        ("--sglang-mem-fraction-static", "did you mean '--mem-frac'?"),
        ("--draft-global-batch-size", "unknown flag; global batch = --batch-size x"),
        ("--batch", "did you mean '--batch-size'?"),
        ("--lerning-rate", "did you mean '--learning-rate'?"),
    ],
)
def test_suggestions_go_by_meaning(flag: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, [flag, "3"])
    assert hint in str(caught.value)


@pytest.mark.parametrize("flag", ["--num-threads", "--frobnicate", "--order", "--seeds-of-doubt"])
def test_no_suggestion_goes_by_spelling_alone(flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainConfig, [flag, "3"])
    (line,) = [line for line in str(caught.value).split("\n") if flag in line]
    assert "did you mean" not in line


def test_every_flag_that_is_suggested_exists() -> None:
    known = {
        flag.removeprefix("--")
        for config in (*config_classes(), Eagle1Config)
        for flag in build_parser(config, leaf_fields(config), "")._option_string_actions
    }
    missing = {name for names in peer_flags().values() if not isinstance(names, str) for name in names} - known
    assert missing == set()


def test_yaml_takes_synonyms_and_names_its_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base_model_path: m\ntarget: {mem_fraction_static: 0.25}\n")
    assert parse_config(Example, ["--config", str(file)]).target.mem_frac == 0.25
    file.write_text("target: {target_model_path: m, max_length: 7, tp_size: 0}\n")
    with pytest.raises(ConfigError) as caught:
        parse_config(Example, ["--config", str(file)])
    assert f"{file}: target.max_length: unknown key; did you mean 'data.max_length'?" in str(caught.value)
    assert f"{file}: target.tp_size: Input should be greater than or equal to 1 (found 0)" in str(caught.value)


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


def test_a_reader_that_has_read_enough_ends_a_script_quietly() -> None:
    code = "from specforge_lite.core.log import info, run_script;"
    code += "run_script(lambda: [info('x' * 99) for _ in range(9999)] and None)"
    script = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, "")
    assert done.stdout == "x" * 99 + "\n"
