"""The tutorial: the same commands in both languages, each checked against the script it calls, and those marked
` ```bash run ` run in their order on the shipped target, in a small form; every relative link of the documentation."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.script_runner import run_in_process

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = ROOT / "docs" / "tutorial"
FENCE = re.compile(r"^```bash( run)?\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# Programs that are not ours, and the words after them that say which.
OTHERS = {"hf upload", "vllm serve", "python -m sglang.launch_server"}
OUT = "outputs/tutorial"
# What makes a command small: values in place of the tutorial's.
SMALL = {"--sample-size": "12", "--split-eval": "0.34", "--max-tokens": "24", "--max-new-tokens": "16"}
MORE = {
    "train_eagle3_online": ["--total-steps", "3"], "train_eagle1": ["--total-steps", "3"],
    "evaluate_draft": ["--ttt-length", "3", "--eval-max-samples", "2"],
    "evaluate_checkpoints": ["--ttt-length", "3", "--eval-max-samples", "2"],
    "compare_generation": ["--num-prompts", "2", "--max-new-tokens", "16"],
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of a chapter; `words` without torchrun and its own flags."""

    chapter: str
    text: str
    run: bool

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text)
        if words[0] == "torchrun":
            first = next(i for i, word in enumerate(words) if word.endswith(".py"))
            return ["python", *words[first:]]
        return words

    @property
    def script(self) -> str:
        return Path(self.words[1]).stem


def commands_of(language: str) -> list[Command]:
    found = []
    for chapter in sorted((TUTORIAL / language).glob("*.md")):
        for mark, block in FENCE.findall(chapter.read_text(encoding="utf-8")):
            lines = block.replace("\\\n", " ").splitlines()
            found += [Command(chapter.stem, " ".join(line.split()), bool(mark)) for line in lines if line.strip()]
    return found


COMMANDS = commands_of("en")
OURS = [command for command in COMMANDS if command.words[0] == "python" and command.words[1].endswith(".py")]


def test_both_languages_have_the_same_chapters_and_commands() -> None:
    names = [sorted(path.name for path in (TUTORIAL / language).glob("*.md")) for language in ("en", "zh")]
    assert names[0] == names[1]
    assert len(names[0]) == 7
    assert commands_of("zh") == COMMANDS
    assert len(COMMANDS) > 30


def test_fences_are_balanced_and_headings_agree() -> None:
    for english in sorted((TUTORIAL / "en").glob("*.md")):
        texts = [path.read_text(encoding="utf-8") for path in (english, TUTORIAL / "zh" / english.name)]
        fences, headings = ([len(re.findall(rf"^{mark}", text, re.M)) for text in texts] for mark in ("```", "#+ "))
        assert fences[0] % 2 == 0
        assert fences[0] == fences[1], english.name
        assert headings[0] == headings[1], english.name


def test_every_command_is_ours_or_known() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    for command in COMMANDS:
        if command in OURS:
            assert (ROOT / command.words[1]).is_file(), command.text
        elif command.words[0] == "make":
            assert command.words[1] in targets, command.text
        else:
            assert any(command.text.startswith(other) for other in OTHERS), command.text


class Parsed(Exception):
    """Raised in place of running a script whose flags were understood."""


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"tutorial_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dry_parse(command: Command) -> None:
    """Run `main` up to the point where its own config class has read the flags. Raises ConfigError for a wrong one."""
    module = load(ROOT / command.words[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command.words[1:])
        owner = sys.modules[module.main.__module__]
        patch.setattr(owner, "parse_config", parse_and_stop(owner.parse_config))
        with pytest.raises(Parsed):
            module.main()


def parse_and_stop(original: Any) -> Any:
    def parse(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        raise Parsed

    return parse


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that looks like the repository; outputs go elsewhere."""
    for name in ("configs", "scripts", "benchmarks", "specforge_lite"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_flag_is_understood_by_its_script(checkout: Path) -> None:
    """Those that are run below need no reading of their flags here."""
    seen = set()
    for command in [command for command in OURS if not command.run]:
        for word in command.words:  # files that an earlier command would have made
            if word.endswith((".jsonl", ".json")) and not (checkout / word).exists():
                (checkout / word).parent.mkdir(parents=True, exist_ok=True)
                (checkout / word).write_text("{}\n")
        dry_parse(command)
        seen.add(command.script)
    assert len(seen) >= 12


def test_the_check_finds_a_wrong_flag(checkout: Path) -> None:
    from specforge_lite.core.errors import ConfigError

    (checkout / "eval.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="--promts: unknown flag; did you mean '--prompts'"):
        dry_parse(Command("", "python scripts/compare_generation.py --base-model-path M --draft-model-path d "
                              "--promts eval.jsonl", False))  # fmt: skip


def small(command: Command) -> list[str]:
    """The command's words with small sizes."""
    words = command.words[2:]
    for i, word in enumerate(words[:-1]):
        if word in SMALL:
            words[i + 1] = SMALL[word]
    extra = MORE.get(command.script, [])
    for flag in extra[::2]:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    return [*words, *extra]


def test_the_marked_commands_run_in_their_order(checkout: Path, capsys: Any) -> None:
    runnable = [command for command in OURS if command.run]
    assert len(runnable) >= 13
    for command in runnable:
        code = run_in_process(command.script, small(command))
        assert code == 0, f"{command.text}\n{capsys.readouterr().err}"
    out = checkout / OUT
    made = ["train.jsonl", "eval.jsonl", "draft/model.safetensors", "evaluation.json", "decoding.json",
            "tiny-eagle3/README.md", "run/report.html", "lk/exit_summary.json", "eagle1/exit_summary.json",
            "tiny-eagle3/tokenizer.json", "fim", "run/training_curves.png", "errors/errors.html",
            "run/evaluation"]  # fmt: skip
    missing = [name for name in made if not (out / name).exists()]
    assert not missing
    card = (out / "tiny-eagle3" / "README.md").read_text()
    served = next(command for command in COMMANDS if "sglang.launch_server" in command.text)
    flags = [word for word in served.words if word.startswith("--")]
    assert all(flag in card for flag in flags)  # the tutorial launches as the card says


def test_the_quickstart_runs_the_same_commands() -> None:
    """What the test above runs small, the quickstart runs in full: the same scripts with the same settings."""
    source = (ROOT / "scripts" / "quickstart.py").read_text()
    scripts = set(re.findall(r"scripts/(\w+)\.py", source))
    shared = [command for command in OURS if command.run and command.script in scripts]
    assert {c.script for c in shared} >= {"prepare_data", "generate_data_by_target", "build_eagle3_dataset_cache",
                                          "train_eagle3_online", "export_draft", "check_draft", "evaluate_draft",
                                          "compare_generation"}  # fmt: skip
    training = next(command for command in shared if command.script == "train_eagle3_online")
    for flag in ("--batch-size", "--learning-rate", "--ttt-length", "--warmup-ratio", "--max-length", "--log-interval"):
        value = training.words[training.words.index(flag) + 1]
        assert re.search(rf'"{flag}", "{re.escape(value)}"', source), flag


def documents() -> Iterator[Path]:
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))
    yield from sorted((ROOT / "benchmarks").rglob("*.md"))


def test_every_relative_link_leads_somewhere() -> None:
    broken, count = [], 0
    for document in documents():
        text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:", target) or target.startswith("#"):
                continue
            count += 1
            if not (document.parent / target.split("#")[0]).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert not broken
    assert count > 60


def test_every_chapter_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {os.path.normpath(ROOT / "docs" / target) for target in LINK.findall(index)}
    pages = [path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"]
    assert [str(page) for page in pages if str(page) not in linked] == []
