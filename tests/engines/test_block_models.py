"""Exported DSpark and DFlash directories in the engines' own model classes: the same numbers as ours.

DSpark is served on a GPU by both engines, DFlash by SGLang too: on a CPU this shows that names, layers, norms, RoPE,
Markov and confidence head and every key of config.json mean there what they mean here.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from block_model import PlainAttention
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge_lite.checkpoints.export import export_draft
from specforge_lite.core.hub import load_config
from specforge_lite.model.block import BlockDraft
from specforge_lite.model.draft import DraftConfig
from specforge_lite.model.target_head import load_target_head

ROOT = Path(__file__).resolve().parents[2]
BLOCK_SIZE, NUM_CONTEXT, ANCHOR = 5, 9, 77
LARGEST_DIFFERENCE = 2e-5  # of values up to 7, in fp32
AUX_LAYERS = (1, 3, 5)


def save_draft(kind: str, target: Path, folder: Path) -> BlockDraft:
    """Random weights, norms too: a swapped one is seen."""
    is_dspark = kind == "dspark"
    config = DraftConfig.from_target(load_config(str(target)), None, kind).replace(
        aux_layer_ids=AUX_LAYERS, num_hidden_layers=2, block_size=BLOCK_SIZE, mask_token_id=0,
        markov_rank=16 if is_dspark else 0, confidence_head=is_dspark,
    )  # fmt: skip
    torch.manual_seed(0)
    size = config.vocab_size
    draft = BlockDraft(config, torch.zeros(size, dtype=torch.int64), torch.ones(size, dtype=torch.bool))
    for name, parameter in draft.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    export_draft(draft, folder, dtype="float32")
    return draft.eval().requires_grad_(False)


def our_block(draft: BlockDraft, inputs: dict[str, Tensor], one_key_norm: bool) -> dict[str, Tensor]:
    """What `block_model.py` computes, by our layers.

    one_key_norm: context keys take the first layer's k_norm in all layers. vLLM 0.32.0 hands its kernel the weights of
    all layers at once (`_normalize_context_k`), and the CPU build of that kernel reads the first row only.
    """
    num_context = len(inputs["features"])
    context = draft.first_state(inputs["features"])
    slots = num_context + torch.arange(len(inputs["ids"]))
    state = torch.nn.functional.embedding(inputs["ids"], inputs["embed"])
    found: dict[str, list[Tensor]] = {"keys": [], "values": []}
    for layer in draft.block_layers:
        config = draft.config
        attention = PlainAttention(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        own_norm = layer.self_attn.k_norm
        layer.self_attn.k_norm = draft.block_layers[0].self_attn.k_norm if one_key_norm else own_norm
        keys, values = layer.keys_values(context, *draft.rope(torch.arange(num_context)))
        layer.self_attn.k_norm = own_norm
        attention.do_kv_cache_update(layer, keys, values)
        found["keys"].append(keys)
        found["values"].append(values)
        x = layer.input_layernorm(state)
        rope = draft.rope(slots)
        attended = attention(layer.queries(x, *rope), *layer.keys_values(x, *rope))
        state = layer.finish(state, attended.unflatten(1, (-1, config.head_dim)))
    state = draft.norm(state)
    result = {name: torch.stack(layers) for name, layers in found.items()}
    result |= {"state": state, "logits": state @ inputs["lm_head"].T}
    markov, confidence = draft.markov_bias(inputs["previous"]), draft.confidence(state, inputs["previous"])
    if markov is not None and confidence is not None:
        result |= {"markov": markov, "confidence": confidence.sigmoid()}
    return result


@pytest.mark.parametrize(("engine", "kind"), [("vllm", "dspark"), ("sglang", "dspark"), ("sglang", "dflash")])
def test_the_engines_own_class_computes_what_ours_does(
    engine: str, kind: str, tiny_target: Path, tmp_path: Path
) -> None:
    draft = save_draft(kind, tiny_target, tmp_path / "draft")
    head = load_target_head(tiny_target, load_config(str(tiny_target))).to("cpu", torch.float32)
    inputs = {
        "features": torch.randn(NUM_CONTEXT, len(AUX_LAYERS) * draft.config.hidden_size),
        "embed": head.embed_VH.clone(),
        "lm_head": head.lm_head_VH.clone(),
        "ids": draft.block_input(torch.tensor([ANCHOR]))[0],
        "previous": torch.tensor([ANCHOR, 5, 300, 4095, 17]),
    }
    save_file(inputs, tmp_path / "inputs")
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    script = Path(__file__).with_name("block_model.py")
    done = subprocess.run(
        [python, script, engine, tmp_path / "draft", tiny_target, tmp_path / "inputs", tmp_path / "outputs"],
        env={
            **os.environ, "PYTHONPATH": "", "SGLANG_USE_CPU_ENGINE": "1", "SGLANG_RAGGED_VERIFY_MODE": "cap-accept",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "outputs")
    for name, ours in our_block(draft, inputs, one_key_norm=engine == "vllm").items():
        assert theirs[name].shape == ours.shape, name
        difference = float((theirs[name] - ours).abs().max())
        print(f"{engine} {kind} {name}: {difference:.1e} of {float(ours.abs().max()):.3g}")
        assert difference < LARGEST_DIFFERENCE, name
    if kind == "dspark":
        assert theirs["num_draft_tokens"].tolist() == [BLOCK_SIZE]
    if engine == "vllm":
        assert theirs["aux_inputs"].tolist() == [layer + 1 for layer in AUX_LAYERS]
