"""A stand-in for sgl_kernel on a CPU, in plain torch: no CPU wheel of it exists.

It holds what sglang 0.5.23 calls with SGLANG_USE_CPU_ENGINE=1 on a CPU without AMX, for dense Llama-like models and
greedy EAGLE decoding. Any other name is a function that raises NotImplementedError when it is called.
Function names and argument orders are sglang's; `slots` keeps its request tables, `trees` its draft trees.
"""

import torch

from .attention import decode_attention, extend_attention
from .slots import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
)
from .trees import build_tree_kernel_efficient_cpu, verify_tree_greedy_cpu

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
]
__version__ = "0.0.0+cpu"

torch.ops.sgl_kernel.decode_attention_cpu = decode_attention
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention


def __getattr__(name):
    """sglang imports many kernels it does not call here; each is accepted and refuses to run."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"the CPU stand-in for sgl_kernel has no {name}")

    missing.__name__ = name
    return missing
