"""`state_N` directories as EAGLE's trainers write them, made from a draft of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specforge_lite.model.draft import Draft


def eagle1_tensors(draft: Draft, table_VH: Tensor, bias: float = 0.0) -> dict[str, Tensor]:
    """State dict of EAGLE-1's `Model` (cnets1.py) in the order of its modules: embedding table, layer, fc."""
    own = {name: parameter.detach().clone() for name, parameter in draft.named_parameters()}
    layer = [name for name in own if name != "fc.weight"]
    width = len(own["fc.weight"])
    return {
        "embed_tokens.weight": table_VH.clone(),
        **{name.replace("layer.", "layers.0.", 1) if name.startswith("layer.") else name: own[name] for name in layer},
        "fc.weight": own["fc.weight"],
        "fc.bias": torch.full((width,), bias),
    }


def write_accelerate_state(folder: Path, tensors: dict[str, Tensor], num_steps: int = 3) -> dict[str, Tensor]:
    """pytorch_model.bin and optimizer.bin of AdamW after some steps, numbered as `model.parameters()` are; the frozen
    table is among the parameters and has no state. Returns exp_avg by name."""
    folder.mkdir(parents=True)
    parameters = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    parameters["embed_tokens.weight"].requires_grad_(False)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-2
        optimizer.step()
    torch.save({name: parameter.detach() for name, parameter in parameters.items()}, folder / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    (folder / "random_states_0.pkl").write_bytes(b"not read")
    return {name: optimizer.state[p]["exp_avg"] for name, p in parameters.items() if p.requires_grad}


def write_deepspeed_state(folder: Path, draft: Draft, dtype: torch.dtype = torch.float16) -> None:
    """pytorch_model.bin of DeepSpeed's `save_16bit_model` for EAGLE-3: half precision, with the vocabulary map."""
    folder.mkdir(parents=True)
    tensors = {name: parameter.detach().to(dtype) for name, parameter in draft.named_parameters()}
    tensors |= {"d2t": draft.d2t.clone(), "t2d": draft.t2d.clone(), "target_model.lm_head.weight": torch.zeros(2, 2)}
    torch.save(tensors, folder / "pytorch_model.bin")
