"""Decisions of the vLLM plugin that a client cannot provoke at will, made in vLLM's own environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

from specforge_lite.serving.environment import installed_engine_python

CODE = """
from types import SimpleNamespace
from specforge_capture.vllm_connector import CaptureMetadata, Save, SpecforgeConnector, _hidden_state_group

log = []
connector = SpecforgeConnector.__new__(SpecforgeConnector)
connector._writes, connector._stale, connector._cached_this_step, connector._cache_layer = True, set(), False, "c"
connector._writer = SimpleNamespace(fail=lambda key, reason: log.append(("failed", key, reason)))
connector._save = lambda save: log.append(("saved", save.key))

def step(cached, prefilled, saved):
    if cached:
        connector.save_kv_layer("c", None, None)
    connector.bind_connector_metadata(CaptureMetadata([Save(key, [1], [0]) for key in saved], prefilled))
    connector.wait_for_save()

step(True, ["a", "b"], ["b"])         # a runs in three chunks; b in one
step(False, ["a", "c"], ["c"])        # the layer is skipped: a's second chunk and all of c are missing
step(True, ["a", "d"], ["a", "d"])    # a completes, with a hole
step(True, ["a"], ["a"])              # asked again under another request, whole
for entry in log:
    print(*entry[:2])
print(log[1][2])

def group(*layers):
    return SimpleNamespace(layer_names=list(layers))

for groups in (
    [group("layers.0", "cache_only_layers.8")],
    [group("layers.0"), group("layers.1"), group("cache_only_layers.8")],
    [group("layers.0")],
    [],
):
    try:
        print(_hidden_state_group(SimpleNamespace(kv_cache_groups=groups)))
    except ValueError as error:
        print(error)
"""


def test_a_prompt_with_a_chunk_that_was_not_kept_fails_and_no_other_group_is_read(tmp_path: Path) -> None:
    python = installed_engine_python("vllm")
    assert python is not None
    done = subprocess.run([python, "-c", CODE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-10:] == [
        "saved b",
        "failed c",
        "failed a",
        "saved d",
        "saved a",
        "vLLM kept no hidden states of a part of it; raise --max-model-len",
        "0",
        "2",
        "SpecforgeConnector: 0 of 1 KV-cache groups hold hidden states, expected 1",
        "SpecforgeConnector: 0 of 0 KV-cache groups hold hidden states, expected 1",
    ]
