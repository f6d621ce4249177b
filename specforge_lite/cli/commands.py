"""The console command `specforge-lite COMMAND [FLAGS]`; the scripts call the same functions.

A module here holds the flags of some stages and the lines that call them. What is heavy (torch, transformers, our own
rooms that need them) is imported after the flags are read, so that --help and a mistyped flag answer at once.
"""

from __future__ import annotations

import importlib
import sys

from specforge_lite import __version__
from specforge_lite.core.errors import ConfigError, suggest
from specforge_lite.core.log import run_script

# command -> (module and function, what it does)
COMMANDS = {
    "prepare": ("data:prepare", "turn a data set into the normal form"),
    "regenerate": ("data:regenerate", "replace the answers of a data set by the target's own"),
    "cache": ("data:cache", "tokenize once and count the draft vocabulary"),
    "capture": ("target:capture", "write hidden states to disk, for training without the target"),
    "train": ("train:main", "train an EAGLE-3 draft"),
    "train eagle1": ("train:eagle1", "train an EAGLE-1 draft"),
    "export": ("draft:export", "write a checkpoint's draft as SGLang and vLLM load it"),
    "check": ("draft:check", "check a draft directory against what the engines load"),
    "evaluate": ("evaluate:main", "accuracy, loss and acceptance of a draft"),
    "evaluate checkpoints": ("evaluate:checkpoints", "the same for every checkpoint of a run"),
    "evaluate completions": ("evaluate:completions", "fill holes in code with and without the draft"),
    "compare": ("compare:main", "decode prompts with and without the draft"),
    "compare serving": ("compare:serving", "the same in SGLang or vLLM, against our decoder"),
    "chat": ("chat:main", "chat in the terminal, drafted tokens highlighted"),
    "record": ("record:main", "record the chats of a running server as training data"),
    "serve": ("target:serve", "run a target as a capture server"),
    "bench": ("bench:main", "speed-up of a draft on benchmark prompts"),
    "bench drafts": ("bench:acceptance", "serve drafts or checkpoints, choose the best for a workload"),
    "report": ("report:main", "write report.html of a run"),
    "report curves": ("report:curves", "write training_curves.png of a run"),
    "plan": ("plan:memory", "peak memory, speed and disk before a run"),
    "plan speculation": ("plan:speculation", "choose the draft's shape for serving from a benchmark"),
    "doctor": ("doctor:main", "what this machine can run"),
    "doctor target": ("doctor:target", "will everything work with this model as a target?"),
}


def main() -> None:
    """Entry point of the console command."""
    run_script(_dispatch)


def _dispatch() -> int | None:
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
        print("usage: specforge-lite COMMAND [FLAGS]      COMMAND --help lists its flags\n\n" + "\n".join(lines))
        return 0
    if words[0] == "--version":
        print(f"specforge_lite {__version__}")
        return 0
    count = 2 if " ".join(words[:2]) in COMMANDS else 1
    name = " ".join(words[:count])
    if name not in COMMANDS:
        raise ConfigError(f"unknown command '{name}'{suggest(name, [key for key in COMMANDS if ' ' not in key])}")
    module, function = COMMANDS[name][0].split(":")
    sys.argv = [f"specforge-lite {name}", *words[count:]]
    result: int | None = getattr(importlib.import_module(f"specforge_lite.cli.{module}"), function)()
    return result
