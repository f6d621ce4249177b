"""Runs inside an engine's environment: the engine's own model class loads a block draft and runs one block.

    ENGINE_PYTHON block_model.py sglang|vllm DRAFT TARGET INPUTS OUTPUTS

Only the attention kernel is ours (it wants a GPU, or a server's cache): plain softmax over the context keys that the
engine wrote, and the block's own. INPUTS: features [C, A*H], embed and lm_head [V, H] of the target, whose head every
engine uses; ids [B], previous [B].
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import torch
from safetensors.torch import load_file, save_file


class PlainAttention:
    """One layer's; B slots, C context tokens, G key heads, d width."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.impl, self.kv_cache = self, None
        self.keys_CGd = self.values_CGd = torch.empty(0)

    def do_kv_cache_update(self, layer: Any, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> None:
        shape = (len(keys), self.num_kv_heads, self.head_dim)
        self.keys_CGd, self.values_CGd = keys.reshape(shape).clone(), values.reshape(shape).clone()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
        group = self.num_heads // self.num_kv_heads
        heads = lambda x, count: x.reshape(len(x), count, self.head_dim)  # noqa: E731
        keys = torch.cat([self.keys_CGd, heads(k, self.num_kv_heads)]).repeat_interleave(group, 1)
        values = torch.cat([self.values_CGd, heads(v, self.num_kv_heads)]).repeat_interleave(group, 1)
        scores = torch.einsum("bhd,khd->hbk", heads(q, self.num_heads), keys) * self.head_dim**-0.5
        return torch.einsum("hbk,khd->bhd", scores.softmax(-1), values).flatten(1)


def use_plain_attention(layers: Any) -> list[PlainAttention]:
    found = []
    for layer in layers:
        attention = layer.self_attn
        found.append(PlainAttention(attention.num_heads, attention.num_kv_heads, attention.head_dim))
        del attention.attn
        attention.attn = found[-1]
    return found


def run_vllm(draft: str, target: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from vllm.config import set_current_vllm_config
    from vllm.config.speculative import SpeculativeConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config

    torch.accelerator.empty_cache = lambda: None  # as vLLM's own CPU runner has it
    config = EngineArgs(model=target, dtype="float32", enforce_eager=True, max_model_len=512).create_engine_config()
    # Given with the arguments, a dspark draft is refused on a CPU before anything is loaded.
    config.speculative_config = SpeculativeConfig(
        model=draft, target_model_config=config.model_config, target_parallel_config=config.parallel_config
    )
    with set_current_vllm_config(config), torch.inference_mode():
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
        attention = use_plain_attention(model.model.layers)
        model.model._attn_layers = attention
        model.model.embed_tokens.weight.data[: len(inputs["embed"])].copy_(inputs["embed"])
        num_context = len(inputs["features"])
        context = model.combine_hidden_states(inputs["features"])
        model.precompute_and_store_context_kv(context, torch.arange(num_context), torch.arange(num_context))
        state = model(inputs["ids"], num_context + torch.arange(len(inputs["ids"])))
        embedded = model.markov_embed(inputs["previous"])
        spec = config.speculative_config
        found = {
            "state": state,
            "markov": model.markov_bias(embedded),
            "confidence": model.compute_confidence(state, embedded),
            "aux_inputs": torch.tensor(get_eagle3_aux_layers_from_config(spec)),
            "num_draft_tokens": torch.tensor([spec.num_speculative_tokens]),
        }
    return found | context_of(attention)


def run_sglang(draft: str, target: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention_flags
    from sglang.srt.models.dflash import DFlashDraftModel
    from sglang.srt.models.dspark import Qwen3DSparkModel
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
    from sglang.srt.speculative.dspark_components.dspark_config import resolve_runtime_config
    from transformers import AutoConfig

    arguments = ServerArgs(model_path=target, device="cpu", dtype="float32")
    set_global_server_args_for_scheduler(arguments)
    init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
    initialize_model_parallel(backend="gloo")
    initialize_dp_attention_flags(arguments)
    config = AutoConfig.from_pretrained(draft)
    is_dspark = "DSpark" in config.architectures[0]
    model = (Qwen3DSparkModel if is_dspark else DFlashDraftModel)(config).float()
    model.load_weights(load_file(f"{draft}/model.safetensors").items())
    attention = use_plain_attention(model.layers)
    num_context, num_slots = len(inputs["features"]), len(inputs["ids"])
    with torch.inference_mode():
        context = model.project_target_hidden(inputs["features"])
        for layer, plain in zip(model.layers, attention):
            keys, values = layer.self_attn.kv_proj_only(context)
            keys = layer.self_attn.apply_k_rope(torch.arange(num_context), layer.self_attn.apply_k_norm(keys))
            plain.do_kv_cache_update(layer, keys, values)
        embedded = torch.nn.functional.embedding(inputs["ids"], inputs["embed"])
        positions = num_context + torch.arange(num_slots)
        state = model(inputs["ids"], positions, None, input_embeds=embedded).hidden_states
        found = {"state": state}
        if is_dspark:
            found["markov"] = model.markov_head.step_bias(inputs["previous"], hidden_states=None, state=None)[0]
            previous = inputs["previous"][None]
            found["confidence"] = model.compute_confidence(
                anchor_tokens=previous[:, 0], draft_tokens=previous.roll(-1, 1), confidence_features=state
            )[0][0]
            runtime = resolve_runtime_config(
                draft_hf_config=config, speculative_num_draft_tokens=None, target_vocab_size=len(inputs["embed"])
            )
            found["num_draft_tokens"] = torch.tensor([runtime.gamma])
    return found | context_of(attention)


def context_of(attention: list[PlainAttention]) -> dict[str, torch.Tensor]:
    return {
        "keys": torch.stack([layer.keys_CGd for layer in attention]),
        "values": torch.stack([layer.values_CGd for layer in attention]),
    }


if __name__ == "__main__":
    engine, draft, target, source, output = sys.argv[1:]
    inputs = load_file(source)
    found = {"sglang": run_sglang, "vllm": run_vllm}[engine](draft, target, inputs)
    found["logits"] = found["state"] @ inputs["lm_head"].T
    save_file({name: value.detach().float().contiguous() for name, value in found.items()}, output)
    sys.stdout.flush()
    os._exit(0)  # engines leave threads behind
