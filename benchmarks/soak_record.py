"""The recorder against an upstream that stalls, breaks and floods: nothing lost, nothing doubled, memory that stays.

    python benchmarks/soak_record.py --seconds 3600 --rate 12        # an hour, about a fifth of a core in all
    python benchmarks/soak_record.py --seconds 10 --rate 40          # the same in short; a test runs it

Client and upstream are this process, the recorder is one of its own. What each request asks for is drawn from KINDS;
every reply follows from its number alone, so that the client checks each byte it gets and the end checks each row on
disk. In the first fifth the recorder is killed twice (SIGKILL) and ended once (SIGTERM), and starts again on its port;
then one process goes on to the end, which is a kill. Exit code 1 where a row is lost, doubled or wrong, or memory grew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
import psutil
from aiohttp import web
from pydantic import Field

from specforge_lite.core.log import run_script
from specforge_lite.core.settings import Section, parse_config
from specforge_lite.serving.process import free_port

# How often of a thousand requests, and whether a reply that came whole is a row.
KINDS: dict[str, tuple[int, bool]] = {
    "plain": (300, True),
    "stream": (400, True),
    "stall": (60, True),  # silent in its middle for a while
    "slow": (30, True),  # the client reads slowly
    "flood": (10, True),  # two MB at once
    "break": (60, False),  # the connection is reset in its middle
    "leave": (50, False),  # the client goes in its middle
    "hang": (20, False),  # no answer; the client gives up
    "cut": (30, False),  # ends well, without a finish reason
    "error": (39, False),
    "oversize": (1, False),  # beyond what is recorded
}
BURST = 64


class SoakConfig(Section):
    """How long, and how much at a time."""

    seconds: float = Field(3600.0, gt=0, description="of load")
    rate: float = Field(12.0, gt=0, description="requests a second on average, a fifth of them in bursts of 64")
    stall_seconds: float = Field(8.0, gt=0, description="longest silence; half of it is what the client waits at most")
    allowed_growth_mb: float = Field(8.0, gt=0, description="of the recorder's memory, last against second quarter")
    seed: int = 0


def answer_of(number: int, kind: str) -> str:
    """The text of a reply; some of it is not ASCII."""
    size = {"flood": 2_000_000, "oversize": 17 << 20, "slow": 100_000}.get(kind, 50 + number % 400)
    word = f"{number} čaj {number * 2654435761 % 2**32:x}, "
    return (word * (size // len(word) + 1))[:size]


def reply_of(number: int, kind: str) -> list[bytes]:
    """The whole reply in the pieces that it is sent in."""
    text = answer_of(number, kind)
    choice: dict[str, Any] = {"index": 0, "finish_reason": None if kind == "cut" else "stop"}
    facts = {"id": f"chat-{number}", "model": "soak"}
    if kind == "plain":
        message = {"role": "assistant", "content": text}
        return [json.dumps({**facts, "choices": [{**choice, "message": message}]}).encode()]
    size = max(24, len(text) // 32)
    deltas = [text[at : at + size] for at in range(0, len(text), size)]
    parts = [{"index": 0, "delta": {"content": delta}, "finish_reason": None} for delta in deltas]
    events = [{**facts, "choices": [part]} for part in [*parts, {**choice, "delta": {}}]]
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


class Soak:
    """One run. whole: numbers of the requests whose reply came whole; wrong: what differs, in words."""

    def __init__(self, config: SoakConfig, out: Path) -> None:
        self.config, self.out, self.random = config, out, random.Random(config.seed)
        self.kinds: list[str] = []
        self.whole: set[int] = set()
        self.served: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.recorder_seconds = 0.0
        self.listen = f"127.0.0.1:{free_port()}"

    # --------------------------------------------------------------------------------------------------------- upstream

    async def upstream(self, request: web.Request) -> web.StreamResponse:
        kind, number = json.loads(await request.read())["messages"][0]["content"].split()
        self.served[int(number)] += 1
        if kind == "hang":
            await asyncio.sleep(10 * self.config.stall_seconds)
        if kind == "error":
            return web.json_response({"error": {"message": "busy"}}, status=429 + 71 * (int(number) % 2))
        pieces = reply_of(int(number), kind)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if kind == "plain":
            response.content_length = len(pieces[0])
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for at, piece in enumerate(pieces):
                if at == len(pieces) // 2 and kind == "stall":
                    await asyncio.sleep(int(number) % 97 / 97 * self.config.stall_seconds)
                if at == len(pieces) // 2 and kind == "break":
                    assert request.transport is not None
                    request.transport.abort()
                    break
                await response.write(piece)
                if kind not in ("flood", "oversize") and at % 4 == 3:
                    await asyncio.sleep(0.05)
            await response.write_eof()
        return response

    # ----------------------------------------------------------------------------------------------------------- client

    async def ask(self, session: aiohttp.ClientSession, number: int, kind: str) -> None:
        body = {"model": "soak", "messages": [{"role": "user", "content": f"{kind} {number}"}], "stream": True}
        patience = aiohttp.ClientTimeout(self.config.stall_seconds / 2 if kind == "hang" else None)
        got = b""
        try:
            url = f"http://{self.listen}/v1/chat/completions"
            async with session.post(url, json=body, timeout=patience) as reply:
                async for chunk in reply.content.iter_any():
                    got += chunk
                    if kind == "leave" and len(got) > 200:
                        return
                    if kind == "slow":
                        await asyncio.sleep(0.02)
                if reply.status != 200 or kind == "error":
                    return
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            return
        if got != b"".join(reply_of(number, kind)):
            self.wrong.append(f"{kind} {number}: {len(got)} bytes passed for a whole reply")
        self.whole.add(number)

    async def load(self, session: aiohttp.ClientSession) -> None:
        """Requests at random moments, and bursts, until the time is over; then waits for those that are open."""
        end, names, weights = time.monotonic() + self.config.seconds, list(KINDS), [w for w, _ in KINDS.values()]
        tasks: set[asyncio.Task[None]] = set()
        while time.monotonic() < end:
            size = BURST if self.random.random() < 1 / (4 * BURST) else 1
            for _ in range(size):
                kind = self.random.choices(names, weights)[0]
                task = asyncio.create_task(self.ask(session, len(self.kinds), kind))
                self.kinds.append(kind)
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(self.random.expovariate(0.8 * self.config.rate))
        await asyncio.gather(*tasks)

    # --------------------------------------------------------------------------------------------------------- recorder

    async def recorder(self, upstream: str) -> None:
        """Keep it running, with the ends that the docstring says; look at its memory each second."""
        start, ends = time.monotonic(), [(0.05, signal.SIGKILL), (0.12, signal.SIGTERM), (0.2, signal.SIGKILL)]
        words = ["record", "--upstream", upstream, "--listen", self.listen, "--out", str(self.out), "--file-mb", "32"]
        while True:
            process = subprocess.Popen(
                [sys.executable, "-m", "specforge_lite", *words],
                stdout=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parent.parent,
            )
            watched = psutil.Process(process.pid)
            share, number = ends.pop(0) if ends else (float("inf"), signal.SIGKILL)
            try:
                while time.monotonic() - start < share * self.config.seconds:
                    if process.poll() is not None:
                        raise SystemExit(f"the recorder ended by itself: {process.returncode}")
                    self.memory.append((time.monotonic() - start, watched.memory_info().rss))
                    await asyncio.sleep(min(1.0, self.config.seconds / 200))
            finally:
                times = watched.cpu_times()
                self.recorder_seconds += times.user + times.system
                process.send_signal(number)
                await asyncio.to_thread(process.wait)

    async def run(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.upstream)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        recorder = asyncio.create_task(self.recorder(f"http://127.0.0.1:{runner.addresses[0][1]}"))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            async with asyncio.timeout(60):
                while not recorder.done():
                    with contextlib.suppress(aiohttp.ClientError):
                        async with session.get(f"http://{self.listen}/health"):
                            break
                    await asyncio.sleep(0.1)
            load = asyncio.create_task(self.load(session))
            await asyncio.wait((load, recorder), return_when=asyncio.FIRST_COMPLETED)
            load.cancel()
            recorder.cancel()
            for result in await asyncio.gather(load, recorder, return_exceptions=True):
                if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                    raise result
        await runner.cleanup()

    # ------------------------------------------------------------------------------------------------------------ check

    def check(self) -> list[str]:
        """What is wrong with the rows on disk, in words."""
        wrong, rows = list(self.wrong), Counter[int]()
        for file in sorted(self.out.glob("traffic_*.jsonl")):
            with file.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):  # a kill cut the write short: nobody saw that reply's end
                        continue
                    row = json.loads(line)
                    number = int(row["id"].removeprefix("chat-"))
                    kind = self.kinds[number]
                    rows[number] += 1
                    texts = [turn["content"] for turn in row["conversations"]]
                    if texts != [f"{kind} {number}", answer_of(number, kind)]:
                        wrong.append(f"{kind} {number}: the row is not what was said")
        wanted = {number for number in self.whole if KINDS[self.kinds[number]][1]}
        impossible = {number for number in rows if self.kinds[number] in ("break", "hang", "cut", "error", "oversize")}
        doubled = [number for number, count in rows.items() if count > 1]
        asked_twice = [number for number, count in self.served.items() if count > 1]
        for what, numbers in (
            ("lost", wanted - set(rows)),
            ("doubled", doubled),
            ("no whole reply, yet a row", impossible),
            ("asked of the upstream more than once", asked_twice),
        ):
            wrong += [f"{self.kinds[number]} {number}: {what}" for number in numbers]
        self.num_rows, self.num_wanted = len(rows), len(wanted)
        return wrong


def main() -> int:
    config = parse_config(SoakConfig, description=__doc__ or "")
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(config, Path(directory) / "traffic")
        asyncio.run(soak.run())
        wrong = soak.check()
        size = sum(file.stat().st_size for file in soak.out.iterdir())
    quarter = config.seconds / 4
    parts = [[rss / 1e6 for at, rss in soak.memory if n * quarter <= at < (n + 1) * quarter] for n in range(4)]
    medians = [statistics.median(part) for part in parts]
    if (growth := medians[3] - medians[1]) > config.allowed_growth_mb:
        wrong.append(f"memory grew by {growth:.1f} MB")
    drawn, usage = Counter(soak.kinds), resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{len(soak.kinds):,} requests in {config.seconds:,.0f} s: " + ", ".join(f"{k} {n:,}" for k, n in drawn.items())
    )
    print(
        f"{soak.num_rows:,} rows ({size / 1e6:,.0f} MB) of {soak.num_wanted:,} replies that a client saw whole;"
        f" the others are of replies that a kill or the client cut short"
    )
    print(
        "recorder's memory by quarter, median MB: "
        + ", ".join(f"{m:.0f}" for m in medians)
        + f"; most {max(max(part) for part in parts):.0f}; its CPU {soak.recorder_seconds:,.0f} s,"
        f" client and upstream {usage.ru_utime + usage.ru_stime:,.0f} s"
    )
    for line in wrong[:20]:
        print(f"wrong: {line}")
    print(f"RESULT {'wrong ' + str(len(wrong)) if wrong else 'nothing lost, nothing doubled'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run_script(main)
