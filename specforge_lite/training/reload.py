"""A new draft in a running server, without a restart.

    hand_over("http://127.0.0.1:30000", Path("outputs/live/draft"))

SGLang (0.5.23) takes tensors into its draft alone (`selector: draft`); requests stand still meanwhile and go on, and
the target is not touched. Its `/update_weights_from_disk` is no way: it would load the draft's file into the target as
well. vLLM (0.32) takes a draft only over NCCL or CUDA IPC from a trainer that it was started for.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from specforge_lite.checkpoints.bundle import launch_commands
from specforge_lite.checkpoints.export import export_checkpoint
from specforge_lite.checkpoints.training_run import read_safetensors
from specforge_lite.core.errors import EngineError, SpecforgeError
from specforge_lite.core.http import HttpFailure, HttpLoop
from specforge_lite.core.log import info, warn
from specforge_lite.serving.engine import ServingOptions, read_draft_config

CHUNK_BYTES = 128 << 20
ALGORITHMS = ("EAGLE3", "EAGLE")
VOCABULARY = ("d2t", "t2d")  # read when a server starts, and only then
SHAPE = (
    "architectures", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "draft_vocab_size", "aux_layer_ids", "norm_output", "fc_norm", "rope_parameters",
)  # fmt: skip


def hand_over_checkpoint(url: str, checkpoint: Path, target: str) -> None:
    """Export a checkpoint to `draft` beside it and load that into the server at `url`; the command to serve it is
    printed where that cannot be. Nothing that goes wrong here ends the run: the next checkpoint is handed over as well.
    """
    draft = checkpoint.parent / "draft"
    try:
        hand_over(url, export_checkpoint(checkpoint, draft, overwrite=True))
        info(f"{url} serves the draft of {checkpoint.name} now")
    except SpecforgeError as error:
        warn(f"{checkpoint.name} is not handed over to {url}: {error}")
        if draft.exists():
            options = ServingOptions("sglang", target, str(draft))
            info(f"{draft} is served by\n{launch_commands(options, read_draft_config(draft))}")


def hand_over(url: str, draft_dir: Path) -> None:
    """Load the exported draft into the server at `url`. Raises EngineError or CheckpointError where it cannot take it,
    or does not say enough to know that it can. A draft that broke off in its middle costs acceptance until the next one
    is there; the answers are the target's in any case."""
    http = HttpLoop(1)
    try:
        facts = http.run(http.get_json(f"{url}/server_info"))
        tensors = _checked(facts, draft_dir)
        http.run(http.post_json(f"{url}/pause_generation", {"mode": "in_place"}))
        try:
            http.run(http.post_json(f"{url}/begin_weight_update", {"selector": "draft"}))
            try:
                for chunk in _chunks(tensors):
                    text = base64.b64encode(pickle.dumps(chunk)).decode()
                    body = {"serialized_named_tensors": [text] * int(facts["tp_size"]), "selector": "draft"}
                    http.run(http.post_json(f"{url}/update_weights_from_tensor", {**body, "flush_cache": False}))
            finally:
                http.run(http.post_json(f"{url}/end_weight_update", {}))
        finally:
            http.run(http.post_json(f"{url}/continue_generation", {}))
    except HttpFailure as error:
        raise EngineError(f"{url}: {error.detail}") from None
    finally:
        http.close()


def _checked(facts: dict[str, Any], draft_dir: Path) -> dict[str, Tensor]:
    """The tensors to send, once it is known that the server's draft has their shapes and their vocabulary."""
    served = facts.get("speculative_draft_model_path")
    if facts.get("speculative_algorithm") not in ALGORITHMS or not served:
        raise EngineError(f"it serves no EAGLE draft (speculative_algorithm {facts.get('speculative_algorithm')})")
    if int(facts.get("dp_size") or 1) > 1:
        raise EngineError(f"dp_size {facts['dp_size']}: SGLang updates one replica only")
    try:
        configs = [json.loads((Path(path) / "config.json").read_text()) for path in (served, draft_dir)]
    except (OSError, ValueError) as error:
        raise EngineError(f"its draft at {served} cannot be compared: {error}") from None
    for key in SHAPE:
        if configs[0].get(key) != configs[1].get(key):
            raise EngineError(f"its draft at {served} has {key} {configs[0].get(key)}, this one {configs[1].get(key)}")
    tensors, old = (read_safetensors(sorted(Path(path).glob("*.safetensors"))) for path in (draft_dir, served))
    for name in VOCABULARY:
        new = tensors.pop(name, None)
        if new is not None and (name not in old or not old[name].equal(new)):
            raise EngineError(f"its draft at {served} has another draft vocabulary")
    return tensors


def _chunks(tensors: dict[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors.items():
        if chunk and size + tensor.nbytes > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    yield chunk
