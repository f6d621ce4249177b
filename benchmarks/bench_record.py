"""What the recording proxy adds: to the first byte, to each event, to the end of a stream, beside a direct connection.

    python benchmarks/bench_record.py --streams 64 --rounds 5

Upstream, proxy and client are processes of their own on loopback. The upstream answers at once and then, as an engine
that decodes a batch, sends the next event of all its streams in the same moment, every 20 ms. Requests go direct and
through the proxy in turns, `--streams` at a time, begun at random moments. Milliseconds; added is the difference of the
medians of a round, and of the rounds the median is shown, with the least and the most: a machine that does other things
at the same time makes both connections slower.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aiohttp
from aiohttp import web
from pydantic import Field

from specforge_lite.core.log import run_script
from specforge_lite.core.settings import Section, parse_config

ASK = {"model": "m", "messages": [{"role": "user", "content": "Hello, how are you?"}], "stream": True}


class RecordBenchConfig(Section):
    """The load."""

    streams: int = Field(64, ge=1, description="requests at a time")
    rounds: int = Field(5, ge=1, description="measurements")
    requests: int = Field(640, ge=2, description="requests of a round, half of them direct")
    events: int = Field(32, ge=1, description="events of a stream")
    pause_ms: float = Field(20.0, ge=0, description="between two events")


def serve(config: RecordBenchConfig, port: Any) -> None:
    """The upstream, in a process of its own; sends its port."""

    async def reply(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(config.events + 1):
            end = "stop" if number == config.events else None
            choice = {"index": 0, "delta": {"content": f" {time.perf_counter():.6f}"}, "finish_reason": end}
            await response.write(b"data: " + json.dumps({"id": "1", "choices": [choice]}).encode() + b"\n\n")
            if end is None:
                tick = config.pause_ms / 1000
                await asyncio.sleep(tick - time.perf_counter() % tick)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", reply)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(main())


WHAT = ("first byte", "event", "end of the stream")


async def load(config: RecordBenchConfig, urls: dict[str, str]) -> dict[tuple[str, str], list[float]]:
    """Milliseconds by (what, kind of connection): from the request to the first byte, from the moment an event is sent
    to the moment it is there, from the last event to the end."""
    times: dict[tuple[str, str], list[float]] = {(what, kind): [] for what in WHAT for kind in urls}
    kinds = [list(urls)[number % len(urls)] for number in range(config.requests)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(kind: str) -> None:
            start, seen = time.perf_counter(), []
            async with session.post(urls[kind] + "/v1/chat/completions", json=ASK) as reply:
                async for chunk in reply.content.iter_any():
                    seen.append((time.perf_counter(), chunk))
            end = time.perf_counter()
            times["first byte", kind].append(1000 * (seen[0][0] - start))
            sent = [(at, float(found)) for at, chunk in seen for found in re.findall(rb'" ([0-9.]+)"', chunk)]
            times["event", kind] += [1000 * (at - when) for at, when in sent[1:]]
            times["end of the stream", kind].append(1000 * (end - sent[-1][1]))

        async def slot() -> None:
            await asyncio.sleep(random.random() * config.events * config.pause_ms / 1000)
            while kinds:
                await ask(kinds.pop())

        await asyncio.gather(*(slot() for _ in range(config.streams)))
    return times


def main() -> None:
    config = parse_config(RecordBenchConfig, description=__doc__ or "")
    receiver, sender = multiprocessing.Pipe(False)
    upstream = multiprocessing.get_context("spawn").Process(target=serve, args=(config, sender), daemon=True)
    upstream.start()
    direct = f"http://127.0.0.1:{receiver.recv()}"
    with tempfile.TemporaryDirectory() as out:
        words = ["record", "--upstream", direct, "--listen", "127.0.0.1:0", "--out", out]
        command = [sys.executable, "-m", "specforge_lite", *words]
        proxy = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        assert proxy.stdout is not None
        urls = {"direct": direct, "proxy": proxy.stdout.readline().split()[0]}
        rounds = [asyncio.run(load(config, urls)) for _ in range(config.rounds)]
        os.kill(proxy.pid, signal.SIGTERM)
        print(proxy.communicate()[0].strip())
    upstream.terminate()
    print(f"{config.streams} streams, {config.rounds} rounds of {config.requests} requests, {os.cpu_count()} cores; ms")
    print(
        "| time to | direct p50 | p99 | proxy p50 | p99 | added p50 | least | most |\n|---|---|---|---|---|---|---|---|"
    )
    for what in WHAT:
        cells, medians = [], []
        for kind in ("direct", "proxy"):
            found = [sorted(times[what, kind]) for times in rounds]
            medians.append([statistics.median(values) for values in found])
            cells += [statistics.median(medians[-1]), statistics.median(v[int(0.99 * len(v))] for v in found)]
        added = sorted(proxy - direct for direct, proxy in zip(*medians))
        cells += [statistics.median(added), added[0], added[-1]]
        print(f"| {what} | " + " | ".join(f"{x:.2f}" for x in cells) + " |")


if __name__ == "__main__":
    run_script(main)
