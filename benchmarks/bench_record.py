"""What the recording proxy adds: time to the first byte and of a whole stream, beside a direct connection.

    python benchmarks/bench_record.py --streams 64 --requests 2000

Upstream, proxy and client are processes of their own on loopback. The upstream sends 32 events, one every 20 ms; each
request goes once direct and once through the proxy, in turns, `--streams` at a time. Milliseconds; added is the
difference of the medians.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
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
    requests: int = Field(2000, ge=2, description="requests in all, half of them direct")
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
            choice = {"index": 0, "delta": {"content": "word "}, "finish_reason": end}
            await response.write(b"data: " + json.dumps({"id": "1", "choices": [choice]}).encode() + b"\n\n")
            await asyncio.sleep(config.pause_ms / 1000)
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


async def load(config: RecordBenchConfig, urls: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """(first byte, whole stream) in ms of each request by kind."""
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in urls}
    slots = asyncio.Semaphore(config.streams)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(kind: str) -> None:
            async with slots:
                start = time.perf_counter()
                async with session.post(urls[kind] + "/v1/chat/completions", json=ASK) as reply:
                    await reply.content.readany()
                    first = time.perf_counter() - start
                    await reply.read()
                times[kind].append((first * 1000, (time.perf_counter() - start) * 1000))

        kinds = list(urls)
        await asyncio.gather(*(ask(kinds[number % len(kinds)]) for number in range(config.requests)))
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
        times = asyncio.run(load(config, urls))
        os.kill(proxy.pid, signal.SIGTERM)
        print(proxy.communicate()[0].strip())
    upstream.terminate()
    print(f"{config.streams} streams, {config.requests} requests, {os.cpu_count()} cores; ms")
    print("| time to | direct p50 | p99 | proxy p50 | p99 | added p50 |\n|---|---|---|---|---|---|")
    for index, what in enumerate(("first byte", "end of the stream")):
        cells = []
        for kind in ("direct", "proxy"):
            values = sorted(row[index] for row in times[kind])
            cells += [statistics.median(values), values[int(0.99 * len(values))]]
        print(f"| {what} | " + " | ".join(f"{x:.2f}" for x in [*cells, cells[2] - cells[0]]) + " |")


if __name__ == "__main__":
    run_script(main)
