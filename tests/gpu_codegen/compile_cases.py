"""Compile parts of the training step to sm_90 cubins, two at a time; one JSON line per case.

python -m tests.gpu_codegen.compile_cases GUARD CASE...
CASE = flex:DTYPE:HEADS:KV_HEADS:HEAD_DIM or block:... (the same) or loss:DTYPE:NAME or
blockloss:DTYPE:KIND or gate:DTYPE:DIRECTION
{"case": ..., "kernels": [[name, shared memory], ...], "graphs": ["forward", "backward", ...], "ran": [20, 60, ...],
 "error": null, "seconds": 9.5}     CPU seconds, those of ptxas included

A case takes every number of rows in ROWS, in one process as a training run does: sizes are dynamic, so few graphs
serve them all. ran: the numbers of rows that a compiled graph took.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.gpu_codegen import hopper

ROWS = (20, 60, 120, 700, 4096)

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
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # for profilers only
    hopper.install(Path(guard), lambda name, shared: KERNELS.append((name, shared)))
    import torch._inductor.config as inductor
    from torch.nn.attention import flex_attention as flex

    inductor.compile_threads = 1
    inductor.force_disable_caches = True
    flex._validate_device = lambda *_args, **_kwargs: None
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for result in pool.imap_unordered(compile_case, cases):
            print(json.dumps(result), flush=True)


def compile_case(case: str) -> dict[str, Any]:
    """Of one case, all that ROWS ask for."""
    import torch
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    start = sum(os.times()[:4])
    KERNELS.clear()
    GRAPHS.clear()
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=cuda_backend("forward"),
        bw_compiler=cuda_backend("backward"),
        decompositions=select_decomp_table(),
    )
    kind, dtype, *rest = case.split(":")
    make = {"flex": flex_case, "block": block_case, "loss": loss_case, "blockloss": block_loss_case, "gate": gate_case}[
        kind
    ]
    error, ran = None, []
    try:
        run = make(partial(torch.compile, dynamic=True, backend=backend), getattr(torch, dtype), *rest)
        for rows in ROWS:
            try:
                run(rows)
            except NotRunError:
                ran.append(rows)
    except Exception as problem:  # whatever a compiler raises is this tool's result
        chain: BaseException | None = problem
        while chain is not None and chain.__cause__ is not None:
            chain = chain.__cause__
        error = f"{type(chain).__name__}: {chain}"[:900]
    seconds = round(sum(os.times()[:4]) - start, 1)
    return {"case": case, "kernels": KERNELS, "graphs": GRAPHS, "ran": ran, "error": error, "seconds": seconds}


Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def flex_case(compile_: Compile, dtype: Any, heads: str, kv_heads: str, head_dim: str) -> Callable[[int], None]:
    """Attention of step 1 with one later key over a document of some rows."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from specforge_lite.model import flex
    from specforge_lite.model.row_plan import plan_rows, predictable_tokens

    flex._COMPILED["flex"] = compile_(flex_attention)
    attention = flex.Flex("cuda")

    def run(rows: int) -> None:
        mask = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) > 0.4
        plan = plan_rows(predictable_tokens(mask, [0, rows]), [0, rows], 3).to("cpu", attention.plan)
        step = plan.steps[1]
        make = lambda count, num: torch.randn(count, int(num), int(head_dim), dtype=dtype, requires_grad=True)  # noqa: E731
        keys, values = ([make(plan.num_keys, kv_heads), make(len(step.row_tokens), kv_heads)] for _ in range(2))
        attention.attend(make(len(step.row_tokens), heads), keys, values, step).sum().backward()

    return run


def block_case(compile_: Compile, dtype: Any, heads: str, kv_heads: str, head_dim: str) -> Callable[[int], None]:
    """Attention of a DSpark layer, blocks of 7, over a document of some rows."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from specforge_lite.model import block_attention, flex
    from specforge_lite.model.block_plan import anchor_candidates, plan_blocks

    flex._COMPILED["flex"] = compile_(flex_attention)
    block_attention.run_flex = lambda *arguments: flex.run_flex(*arguments[:-1], True)

    def run(rows: int) -> None:
        mask = torch.ones(rows, dtype=torch.bool)
        plan = plan_blocks(mask, [0, rows], anchor_candidates(mask, [0, rows])[::9], 7, 0)
        plan = plan.to(torch.device("cpu"), with_flex_masks=True)
        make = lambda count, num: torch.randn(count, int(num), int(head_dim), dtype=dtype, requires_grad=True)  # noqa: E731
        num_context, num_slots = len(plan.context_tokens_C), len(plan.slot_positions_S)
        keys = (make(num_context, kv_heads), make(num_context, kv_heads), make(num_slots, kv_heads))
        block_attention.flex_attention(
            make(num_slots, heads), *keys, make(num_slots, kv_heads), plan.every, plan
        ).sum().backward()

    return run


def loss_case(compile_: Compile, dtype: Any, name: str) -> Callable[[int], None]:
    """The loss between the matrix products, which forms its gradient in the same pass; K 7, a vocabulary of 32,000."""
    import torch

    from specforge_lite.model.lk_loss import lk_pass
    from specforge_lite.model.losses import cross_entropy_pass

    compiled = compile_(cross_entropy_pass if name == "ce" else lk_pass)

    def run(rows: int) -> None:
        logits, teacher = (torch.empty(*shape, 32000, dtype=dtype) for shape in ((rows, 7), (rows,)))
        more = () if name == "ce" else (torch.empty(rows), name)
        compiled(logits, teacher, torch.zeros(rows, dtype=torch.int64), *more)

    return run


def block_loss_case(compile_: Compile, dtype: Any, kind: str) -> Callable[[int], None]:
    """The same of a block draft, whose three predictions share a token's place; a vocabulary of 32,000."""
    import torch

    from specforge_lite.model.block_loss import loss_pass

    compiled = compile_(loss_pass)

    def run(rows: int) -> None:
        logits = torch.empty(3 * rows, 32000, dtype=dtype)
        teacher = torch.empty(rows, 32000, dtype=dtype) if kind == "dspark" else None
        places, labels = torch.arange(3 * rows) // 3, torch.zeros(3 * rows, 1, dtype=torch.int64)
        compiled(logits, teacher, places, labels, torch.ones(3 * rows), 0.1, 0.9)

    return run


def gate_case(compile_: Compile, dtype: Any, direction: str) -> Callable[[int], None]:
    """SwiGLU's product; width of Llama-3.1-8B."""
    import torch

    from specforge_lite.model.layers import silu_gate, silu_gate_backward

    compiled = compile_(silu_gate if direction == "forward" else silu_gate_backward)

    def run(rows: int) -> None:
        grad, gate_up = torch.empty(rows, 14336, dtype=dtype), torch.empty(rows, 28672, dtype=dtype)
        compiled(*([gate_up] if direction == "forward" else [grad, gate_up]))

    return run


if __name__ == "__main__":
    main()
