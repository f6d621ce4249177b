"""Chat with a target in the terminal, with its draft on or off: tokens that the draft had guessed are highlighted.

    python scripts/chat.py --target-model-path TARGET --draft-model-path DRAFT

Commands: /draft on, /draft off, /clear, /help, /quit (or Ctrl-D). Ctrl-C stops an answer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from specforge_lite.cli.options import TreeFlags, open_model
from specforge_lite.core.errors import SpecforgeError, suggest
from specforge_lite.core.sections import DRAFT_FLAGS, LocalTargetSection
from specforge_lite.core.settings import flag, parse_config

if TYPE_CHECKING:
    from specforge_lite.inference.chat import Chat, Piece

DRAFTED_STYLE, OWN_STYLE, FOOTER_STYLE = "black on green", "", "dim"
COMMANDS = {
    "/draft on": "let the draft guess",
    "/draft off": "one token per pass",
    "/clear": "forget the conversation",
    "/help": "this list",
    "/quit": "leave",
}


class ChatConfig(LocalTargetSection, TreeFlags):
    """Who talks, and how."""

    draft_model_path: Path | None = Field(None, description="exported draft directory", json_schema_extra=DRAFT_FLAGS)
    num_draft_tokens: int | None = flag(None, "a chain of so many tokens instead of a tree", ge=1)
    temperature: float = flag(0.0, "0: greedy", ge=0)
    top_p: float = Field(1.0, ge=0, le=1)
    max_new_tokens: int = Field(512, ge=1)
    system_prompt: str | None = None
    prompt: tuple[str, ...] = flag((), "ask these, one after another, and leave")


def main() -> None:
    config = parse_config(ChatConfig, description=__doc__ or "")
    from specforge_lite.inference import GenerationSettings
    from specforge_lite.inference.chat import Chat

    shape = config.model_dump(include={"total_token", "depth", "top_k", "num_draft_tokens"})
    settings = GenerationSettings(**config.model_dump(include={"max_new_tokens", "temperature", "top_p"}))
    model = open_model(config, config.draft_model_path, **shape)
    chat = Chat(model, settings, config.system_prompt)
    console = Console()
    for prompt in config.prompt:
        console.print(f"> {prompt}", markup=False, style="bold")
        answer(chat, prompt, console)
    if not config.prompt:
        talk(chat, console)


def talk(chat: Chat, console: Console) -> None:
    """Read lines until the end of the input or /quit."""
    legend = Text("guessed by the draft", style=DRAFTED_STYLE)
    console.print(f"draft {'on' if chat.speculate else 'off'}; /help lists the commands;", legend, highlight=False)
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            console.print(run_command(chat, line), markup=False, highlight=False)
        elif line:
            try:
                answer(chat, line, console)
            except SpecforgeError as error:
                console.print(f"error: {error}", markup=False, style="red")


def run_command(chat: Chat, command: str) -> str:
    """Carry out a command; -> the reply."""
    if command == "/clear":
        chat.clear()
        return "forgotten"
    if command in ("/draft on", "/draft off"):
        if command.endswith("on") and chat.model.drafter is None:
            return "no draft was loaded; start with --draft-model-path"
        chat.speculate = command.endswith("on")
        return f"draft {'on' if chat.speculate else 'off'}"
    known = "\n".join(f"{name:12} {what}" for name, what in COMMANDS.items())
    return known if command == "/help" else f"unknown command {command}{suggest(command, COMMANDS)}"


def answer(chat: Chat, question: str, console: Console) -> None:
    """Show an answer as it grows. Finished lines are printed for good; the open line and the pace are updated."""
    line = Text()
    pieces = chat.ask(question)
    with Live(console=console, transient=True, refresh_per_second=12, auto_refresh=console.is_terminal) as live:
        try:
            for piece in pieces:
                line = show(piece, line, console)
                if console.is_terminal:
                    live.update(Group(line, Text(chat.pace.line(), style=FOOTER_STYLE)))
        except KeyboardInterrupt:
            line.append(" [stopped]", style=FOOTER_STYLE)
        live.update(Text(""))
    console.print(line, soft_wrap=True)
    console.print(Text(chat.pace.line(), style=FOOTER_STYLE))
    sys.stdout.flush()


def show(piece: Piece, line: Text, console: Console) -> Text:
    """Add a piece to the open line; whole lines are printed. -> the open line."""
    style = DRAFTED_STYLE if piece.drafted else OWN_STYLE
    *finished, rest = piece.text.split("\n")
    for part in finished:
        line.append(part, style=style)
        console.print(line, soft_wrap=True)
        line = Text()
    line.append(rest, style=style)
    return line
