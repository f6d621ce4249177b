"""A process that has imported everything once and forks a child per stage run, so that killing a stage costs what the
stage costs and not four seconds of imports. Run as `python kill_host.py`; one JSON request per line on stdin, one JSON
reply per line on stdout.

request  {"script": NAME, "flags": [...], "root": DIR, "log": FILE, "at_event": N | null, "after_s": S | null,
          "max_file_bytes": B | null}
reply    {"status": exit code or -signal, "events": file operations below DIR, "seconds": S}

at_event: the child kills itself with SIGKILL just before its N-th operation that writes, renames or deletes below
`root`: these are the moments that matter, among them those between a rename and the tidying up after it. after_s: it is
killed from outside after so many seconds, wherever it is, for instance in the middle of writing a file. max_file_bytes:
writes beyond that size of a file fail, as on a full disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch._dynamo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.script_runner import load_script

SCRIPTS = (
    "build_eagle3_dataset_cache",
    "capture_hidden_states",
    "export_draft",
    "generate_data_by_target",
    "prepare_data",
    "train_eagle3_online",
)
# Audit events of CPython (docs.python.org/3/library/audit_events.html) that change a directory or a file.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.move")
POLL_SECONDS = 0.001
NUM_EVENTS = "events"


class EventCounter:
    """Counts changes below `root`; ends the process before the one it is told."""

    def __init__(self, root: Path, at_event: int | None) -> None:
        self.root, self.at_event, self.count = str(root), at_event, 0
        sys.addaudithook(self.see)

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not (writes or (isinstance(mode, str) and set(mode) & set("wax+"))):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(self.root):
            self.count += 1
            if self.count == self.at_event:
                os.kill(os.getpid(), signal.SIGKILL)


def run_child(modules: dict[str, ModuleType], request: dict[str, Any], pipe: int) -> None:
    """In the child: run the script's main as `python scripts/NAME.py FLAGS` would, and never return."""
    from specforge_lite.core.log import run_script

    handle = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 1
    if request["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], request["max_file_bytes"]))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    counter = EventCounter(Path(request["root"]), request["at_event"])
    sys.argv = [f"{request['script']}.py", *request["flags"]]
    try:
        run_script(modules[request["script"]].main)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        os.write(pipe, str(counter.count).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(pid: int, kill_at: float | None) -> int:
    """Exit code, or minus the signal; SIGKILL is sent at the time `kill_at`."""
    while True:
        found, status = os.waitpid(pid, os.WNOHANG if kill_at is not None else 0)
        if found:
            return os.waitstatus_to_exitcode(status)
        if kill_at is not None and time.monotonic() >= kill_at:
            os.kill(pid, signal.SIGKILL)
            kill_at = None
        time.sleep(POLL_SECONDS)


def serve(modules: dict[str, ModuleType], replies: Any) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            run_child(modules, request, writing)
        os.close(writing)
        status = wait_for(pid, None if request["after_s"] is None else start + request["after_s"])
        with os.fdopen(reading) as pipe:
            count = pipe.read()
        reply = {"status": status, NUM_EVENTS: int(count or 0), "seconds": time.monotonic() - start}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    import aiohttp  # noqa: F401  (what the stages import late, most of their time)
    import safetensors.torch  # noqa: F401
    import transformers
    import transformers.models.llama.configuration_llama

    import specforge_lite.training.loop  # noqa: F401

    torch.set_num_threads(1)
    _ = transformers.AutoTokenizer, transformers.AutoConfig
    replies = os.fdopen(os.dup(1), "w")
    print(json.dumps("ready"), file=replies, flush=True)
    serve({name: load_script(name) for name in SCRIPTS}, replies)


if __name__ == "__main__":
    main()
