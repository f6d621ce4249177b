"""Attaches to a server through Mooncake and checks what arrives; run in the trainer's network namespace by
test_mooncake.py. Writes counts as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from live_suite import Oracle, sample

from specforge_lite.capture import transport
from specforge_lite.capture.prefetch import Prefetcher
from specforge_lite.capture.remote import RemoteEngine
from specforge_lite.capture.transport import LostSample, MooncakeTransport
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.registry import open_engine
from specforge_lite.types import CapturedStates


class Trouble(MooncakeTransport):
    """Loses, delays or damages single objects on their way, as a store under pressure or a bad link does."""

    plan: list[str] = []
    seen: dict[str, int] = {}

    keys: list[str] = []
    left = -1

    def close(self) -> None:
        self._remove_all()
        Trouble.left = sum(self._store.is_exist(key) == 1 for key in self.keys)
        super().close()

    def _take(self, key: str, timeout_s: float) -> CapturedStates:
        self.keys.append(key)
        trouble = self.plan.pop(0) if self.plan else ""
        if trouble:
            self.seen[trouble] = self.seen.get(trouble, 0) + 1
            while self._store.is_exist(key) != 1:
                time.sleep(0.01)
        if trouble == "lost":
            assert self._store.remove(key, True) == 0
        if trouble == "late":
            self._remove(key)
            raise LostSample("did not appear in time")  # it was there, but too late for this request
        if trouble == "damaged":
            raw = bytearray(self._store.get(key))
            raw[-1] ^= 1
            self._remove(key)
            return transport.decode(raw, key)
        return super()._take(key, timeout_s)


def main() -> None:
    url, master, model, result = sys.argv[1:]
    transport.MooncakeTransport = Trouble  # type: ignore[misc]
    transport.TAKE_SECONDS = 1.0
    target = TargetSection(
        target_model_path=model, target_backend="vllm", target_url=(url,), transport="mooncake", mooncake_address=master
    )
    engine = open_engine(target, 500)
    assert isinstance(engine, RemoteEngine)
    oracle = Oracle(Path(model))
    samples = [sample(str(i), 1 + 13 * i) for i in range(32)]
    parity = 0
    with Prefetcher(engine, iter([[s] for s in samples]), depth=16) as stream:
        for wanted, states in stream:
            oracle.assert_equal(wanted[0], states[0])
            parity += 1
    for plan in (["lost"], ["late"], ["damaged"], ["lost"]):
        Trouble.plan = plan
        wanted = sample("again", 40 + parity)
        oracle.assert_equal(wanted, engine.capture([wanted])[0])
        parity += 1
    engine.close()
    found = {"parity": parity, **Trouble.seen, "left": Trouble.left}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
