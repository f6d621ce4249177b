"""Compile parts of the training step to sm_90 cubins; one JSON line per case.

python -m tests.gpu_codegen.compile_cases GUARD CASE...
CASE = flex:DTYPE:HEADS:KV_HEADS:HEAD_DIM:ROWS or block:... (the same) or loss:DTYPE:NAME or
blockloss:DTYPE:KIND or gate:DTYPE
{"case": ..., "kernels": [[name, shared memory], ...], "graphs": ["forward", "backward"], "error": null}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.gpu_codegen import hopper

KERNELS: list[tuple[str, int]] = []
GRAPHS: list[str] = []


class NotRunError(Exception):
    """Compiled; there is no device to run it on. Backward is compiled together with forward, as sizes are dynamic."""


def cuda_backend(kind: str) -> Callable[..., Any]:
    """A compiler for AOTAutograd that moves a CPU graph to "cuda:0", compiles it, and does not run it."""
    import torch
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    device = torch.device("cuda:0")

    def on_device(graph: torch.fx.GraphModule) -> None:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                node.kwargs = {
                    name: device if name == "device" and value is not None else value
                    for name, value in node.kwargs.items()
                }

    def compiler(graph: torch.fx.GraphModule, examples: list[Any], **_options: Any) -> Callable[..., Any]:
        mode = next(example.fake_mode for example in examples if isinstance(example, FakeTensor))

        def moved(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            with mode, torch.no_grad():
                return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)

        inputs = [moved(example) for example in examples]
        on_device(graph)
        for node, value in zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs):
            node.meta["val"] = value
        with mode:
            FakeTensorProp(graph, mode=mode).propagate_dont_convert_inputs(*inputs)
        for inner in graph.modules():  # the mask of flex_attention
            if isinstance(inner, torch.fx.GraphModule) and inner is not graph:
                on_device(inner)
                for node in inner.graph.nodes:
                    node.meta["val"] = moved(node.meta.get("val"))
        graph.recompile()
        GRAPHS.append(kind)
        compile_fx_inner(graph, inputs, is_backward=kind == "backward", static_input_idxs=[], graph_id=0)

        def refuse(*_arguments: Any) -> None:
            raise NotRunError

        return refuse

    return compiler


def main() -> None:
    guard, *cases = sys.argv[1:]
    hopper.install(Path(guard), lambda name, shared: KERNELS.append((name, shared)))
    import torch
    import torch._inductor.config as inductor
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table
    from torch.nn.attention import flex_attention as flex

    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    flex._validate_device = lambda *_args, **_kwargs: None
    backend = aot_autograd(
        fw_compiler=cuda_backend("forward"),
        bw_compiler=cuda_backend("backward"),
        decompositions=select_decomp_table(),
    )
    for case in cases:
        KERNELS.clear()
        GRAPHS.clear()
        kind, dtype, *rest = case.split(":")
        error = None
        try:
            for run in {
                "flex": [run_flex],
                "block": [run_block],
                "loss": [run_loss],
                "blockloss": [run_block_loss],
                "gate": [run_gate, run_gate_backward],
            }[kind]:
                with suppress(NotRunError):
                    run(backend, getattr(torch, dtype), *rest)
        except Exception as problem:  # whatever a compiler raises is this tool's result
            chain: BaseException | None = problem
            while chain is not None and chain.__cause__ is not None:
                chain = chain.__cause__
            error = f"{type(chain).__name__}: {chain}"[:900]
        print(json.dumps({"case": case, "kernels": KERNELS, "graphs": GRAPHS, "error": error}), flush=True)


def run_flex(backend: Any, dtype: Any, heads: str, kv_heads: str, head_dim: str, rows: str) -> None:
    """Attention of step 1 with one later key; rows: lengths of the documents, with commas."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from specforge_lite.model import flex, ttt_attention
    from specforge_lite.model.row_plan import plan_rows, predictable_tokens

    if "flex" not in flex._COMPILED:
        flex._COMPILED["flex"] = torch.compile(flex_attention, dynamic=True, backend=backend)
    attention = ttt_attention.Flex("cuda")
    offsets = [0]
    for length in rows.split(","):
        offsets.append(offsets[-1] + int(length))
    mask = torch.rand(offsets[-1], generator=torch.Generator().manual_seed(len(rows))) > 0.4
    plan = plan_rows(predictable_tokens(mask, offsets), offsets, 3).to("cpu", attention.plan)
    step = plan.steps[1]
    make = lambda count, num: torch.randn(count, int(num), int(head_dim), dtype=dtype, requires_grad=True)  # noqa: E731
    keys, values = ([make(plan.num_keys, kv_heads), make(len(step.row_tokens), kv_heads)] for _ in range(2))
    attention.attend(make(len(step.row_tokens), heads), keys, values, step).sum().backward()


def run_block(backend: Any, dtype: Any, heads: str, kv_heads: str, head_dim: str, rows: str) -> None:
    """Attention of a DSpark layer, blocks of 7; rows: lengths of the documents, with commas."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from specforge_lite.model import block_attention, flex
    from specforge_lite.model.block_plan import anchor_candidates, plan_blocks

    if "flex" not in flex._COMPILED:
        flex._COMPILED["flex"] = torch.compile(flex_attention, dynamic=True, backend=backend)
    plain = flex.run_flex
    block_attention.run_flex = lambda *arguments: plain(*arguments[:-1], True)
    offsets = [0]
    for length in rows.split(","):
        offsets.append(offsets[-1] + int(length))
    mask = torch.ones(offsets[-1], dtype=torch.bool)
    plan = plan_blocks(mask, offsets, anchor_candidates(mask, offsets)[::9], 7, 0)
    plan = plan.to(torch.device("cpu"), with_flex_masks=True)
    make = lambda count, num: torch.randn(count, int(num), int(head_dim), dtype=dtype, requires_grad=True)  # noqa: E731
    num_context, num_slots = len(plan.context_tokens_C), len(plan.slot_positions_S)
    keys = (make(num_context, kv_heads), make(num_context, kv_heads), make(num_slots, kv_heads))
    block_attention.flex_attention(
        make(num_slots, heads), *keys, make(num_slots, kv_heads), plan.every, plan
    ).sum().backward()


def run_loss(backend: Any, dtype: Any, name: str) -> None:
    """The loss between the matrix products, which forms its gradient in the same pass."""
    import torch

    from specforge_lite.model.losses import cross_entropy_pass, lk_pass

    logits, teacher = torch.randn(6, 3, 1000).to(dtype), torch.randn(6, 1000).to(dtype)
    ids = torch.zeros(6, dtype=torch.int64)
    if name == "ce":
        torch.compile(cross_entropy_pass, dynamic=True, backend=backend)(logits, teacher, ids)
    else:
        torch.compile(lk_pass, dynamic=True, backend=backend)(logits, teacher, ids, torch.randn(6), name)


def run_block_loss(backend: Any, dtype: Any, kind: str) -> None:
    import torch

    from specforge_lite.model.block_loss import loss_pass

    teacher = torch.randn(6, 1000).to(dtype) if kind == "dspark" else None
    places, labels = torch.arange(18) // 3, torch.zeros(18, 1, dtype=torch.int64)
    arguments = (torch.randn(18, 1000).to(dtype), teacher, places, labels, torch.ones(18), 0.1, 0.9)
    torch.compile(loss_pass, dynamic=True, backend=backend)(*arguments)


def run_gate(backend: Any, dtype: Any) -> None:
    import torch

    from specforge_lite.model.layers import silu_gate

    torch.compile(silu_gate, dynamic=True, backend=backend)(torch.randn(6, 512).to(dtype))


def run_gate_backward(backend: Any, dtype: Any) -> None:
    import torch

    from specforge_lite.model.layers import silu_gate_backward

    grad, gate_up = torch.randn(6, 256).to(dtype), torch.randn(6, 512).to(dtype)
    torch.compile(silu_gate_backward, dynamic=True, backend=backend)(grad, gate_up)


if __name__ == "__main__":
    main()
