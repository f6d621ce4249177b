"""Pass requests to an OpenAI-compatible server and write the finished chats as rows to train a draft on.

    python scripts/record_traffic.py --upstream http://127.0.0.1:30000 --listen 127.0.0.1:8001 --out traffic/
    python scripts/record_traffic.py --upstream http://127.0.0.1:30000 --out traffic/ --sampling-rate 0.1 --max-gb 2 \\
        --redact '[\\w.+-]+@[\\w.-]+' --redact-function privacy.py:redact

Clients use the proxy's address in place of the server's. Nothing but chat completions is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

from specforge_lite.core.log import info
from specforge_lite.core.settings import parse_config
from specforge_lite.serving.record_settings import RecordSection

REPORT_SECONDS = 60.0


def main() -> None:
    asyncio.run(_serve(parse_config(RecordSection, description=__doc__ or "")))


async def _serve(config: RecordSection) -> None:
    from specforge_lite.serving.record import RecordingProxy

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with RecordingProxy(config) as proxy:
        share = f"{config.sampling_rate:.0%} of the chats go to {config.out}"
        info(f"{proxy.url} passes requests to {config.upstream}; {share}")
        reported = ""
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), REPORT_SECONDS)
            if not stop.is_set() and (line := proxy.summary()) != reported:
                info(reported := line)
    info(proxy.summary())
