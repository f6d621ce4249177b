"""The terminal chat: text piece by piece, the draft on and off, commands, and what a terminal is shown."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.cli import chat as chat_command
from specforge_lite.core.errors import ConfigError
from specforge_lite.inference import GenerationSettings, SpeculativeModel
from specforge_lite.inference.chat import Chat
from specforge_lite.inference.output import TextStream
from tests.inference_drafts import OracleDraft, random_draft
from tests.script_runner import ROOT, run_in_process


@pytest.fixture(scope="module")
def plain(tiny_target: Path) -> SpeculativeModel:
    return SpeculativeModel.from_pretrained(str(tiny_target), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def model(plain: SpeculativeModel) -> SpeculativeModel:
    """The tiny target and a draft that knows its answer to QUESTION, but for every third token."""
    text = plain.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    answer = plain.generate(text, max_new_tokens=24).answers[0]
    table = plain.target.embedding_VH
    draft = OracleDraft(table, [answer.all_tokens], lambda position: 9 * (position % 3 == 0), aux_layer_ids=(1, 3, 4))
    return SpeculativeModel(plain.target.model, draft, plain.tokenizer)


QUESTION = "What is 7 times 8?"
SETTINGS = GenerationSettings(max_new_tokens=24)


def test_byte_level_tokens_become_whole_characters(plain: SpeculativeModel) -> None:
    text = "naïve café – 1 → 2, «да»\n\n  x"
    tokens = plain.tokenizer(text)["input_ids"]
    stream = TextStream(plain.tokenizer)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert "" in pieces  # some token ended within a character
    assert all("\ufffd" not in piece for piece in pieces)


def test_answers_and_highlights(model: SpeculativeModel) -> None:
    chat = Chat(model, SETTINGS, system_prompt=None)
    pieces = list(chat.ask(QUESTION))
    text = "".join(piece.text for piece in pieces)
    assert chat.messages == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
    assert chat.pace.num_tokens == len(pieces)
    assert 0 < chat.pace.num_drafted == sum(piece.drafted for piece in pieces) < len(pieces)
    own = len(pieces) - chat.pace.num_drafted
    assert chat.pace.num_passes == own + pieces[-1].drafted  # the limit may cut the last pass before its own token
    chat.clear()
    chat.speculate = False
    assert "".join(piece.text for piece in chat.ask(QUESTION)) == text
    assert chat.pace.num_drafted == 0
    assert f"{chat.pace.num_tokens} tokens in {chat.pace.num_tokens} passes" in chat.pace.line()


def test_the_conversation_is_part_of_the_prompt(model: SpeculativeModel) -> None:
    chat = Chat(model, SETTINGS, system_prompt="You count.")
    list(chat.ask("One."))
    list(chat.ask("Two."))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "You count."}]
    with pytest.raises(ConfigError, match=r"expected 1\.\.1023"):
        list(chat.ask("word " * 2000))
    assert len(chat.messages) == 1


def test_commands(model: SpeculativeModel, plain: SpeculativeModel) -> None:
    script = chat_command
    chat = Chat(model, SETTINGS)
    assert script.run_command(chat, "/draft off") == "draft off"
    assert not chat.speculate
    assert script.run_command(chat, "/draft on") == "draft on"
    assert chat.speculate
    list(chat.ask("hello"))
    assert script.run_command(chat, "/clear") == "forgotten"
    assert chat.messages == []
    assert "did you mean '/quit'?" in script.run_command(chat, "/qiut")
    assert "/draft off" in script.run_command(chat, "/help")
    assert "no draft was loaded" in script.run_command(Chat(plain, SETTINGS), "/draft on")


def test_accepted_tokens_are_coloured(model: SpeculativeModel) -> None:
    script = chat_command
    chat = Chat(model, SETTINGS)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=200)
    script.answer(chat, QUESTION, console)
    green = "\x1b[30;42m"
    shown = screen.getvalue()
    answer = chat.messages[-1]["content"].strip()
    assert green in shown
    assert "tokens/s" in shown
    plain_text = io.StringIO()
    script.answer(Chat(model, SETTINGS), QUESTION, Console(file=plain_text, width=200))
    assert plain_text.getvalue().startswith(answer)
    assert "\x1b" not in plain_text.getvalue()


def test_prompts_on_the_command_line(tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = export_draft(random_draft(128, 4096, 500), tmp_path / "draft")
    words = [
        "--target-model-path", str(tiny_target), "--draft-model-path", str(draft), "--max-new-tokens", "8",
        "--num-draft-tokens", "3", "--device", "cpu", "--prompt", QUESTION, "And now?",
    ]  # fmt: skip
    assert run_in_process("chat", words) == 0
    printed = capsys.readouterr().out
    assert printed.count("8 tokens in") == 2
    assert f"> {QUESTION}" in printed


def test_a_real_terminal(tiny_target: Path) -> None:
    """On a pseudo-terminal: a question, a command, and the end of the input."""
    master, slave = pty.openpty()
    command = [sys.executable, "scripts/chat.py", "--target-model-path", str(tiny_target), "--max-new-tokens", "6"]
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--device", "cpu"], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=environment
    )
    os.close(slave)
    os.write(master, b"hello\n/draft on\n/quit\n")
    shown = b""
    while True:
        try:
            block = os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        if not block:
            break
        shown += block
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = shown.decode()
    assert "draft off; /help lists the commands" in text
    assert "6 tokens in 6 passes" in text
    assert "no draft was loaded" in text
    assert "Traceback" not in text
