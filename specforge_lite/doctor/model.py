"""Checks that run the target: hidden states, teacher logits, final norm, three training steps, greedy decoding."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from specforge_lite.capture.base import check_capture
from specforge_lite.capture.hf import HfEngine, find_decoder
from specforge_lite.doctor import Problem
from specforge_lite.doctor.files import Examination
from specforge_lite.inference.speculative import SpeculativeModel
from specforge_lite.inference.tree import TreeShape
from specforge_lite.model.draft import TTTSettings
from specforge_lite.model.initialize import init_from_target, init_random
from specforge_lite.model.losses import ask_teacher
from specforge_lite.types import TokenizedSample, collate

MAX_SAMPLE_TOKENS = 512
NUM_DECODED = 24


def check_load(x: Examination) -> Iterator[Problem]:
    options, start = x.options, time.perf_counter()
    if not options.load_model:
        yield "skipped", "not loaded (--no-load-model)"
        return
    target, layers = options.target_model_path, x.aux_layer_ids or None
    x.engine = HfEngine(target, layers, options.target_dtype, options.device, options.trust_remote_code)
    dtype = str(x.engine.model.dtype).removeprefix("torch.")
    yield "ok", f"{type(x.engine.model).__name__}, {dtype}, {time.perf_counter() - start:.1f} s to load"


def check_states(x: Examination) -> Iterator[Problem]:
    """The hooks of the hf engine against transformers' own hidden states."""
    if x.sample is None:
        ids = torch.arange(3, 3 + min(64, x.text_config.vocab_size - 3))
        x.sample = TokenizedSample("verify", ids, torch.arange(len(ids)) >= 8)
    x.sample = TokenizedSample(
        "verify", x.sample.input_ids_L[:MAX_SAMPLE_TOKENS], x.sample.loss_mask_L[:MAX_SAMPLE_TOKENS]
    )
    (x.states,) = x.engine.capture([x.sample])
    check_capture(x.sample, x.states, x.engine.info)
    if not bool(torch.isfinite(x.states.last_LH).all()):
        yield "broken", "the last hidden state has NaN or infinity"
    with torch.no_grad():
        ids = x.sample.input_ids_L[None].to(x.engine.device)
        own = x.engine.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    if not own:
        yield "warning", "the model returns no hidden states of its own to compare with"
        return
    for index, layer in enumerate(x.engine.info.aux_layer_ids):
        yield from _compare(f"output of layer {layer}", x.states.aux_LAH[:, index], own[layer + 1][0])
    yield "ok", f"captured {len(x.sample)} tokens; aux states are transformers' hidden_states[i + 1]"


def check_logits(x: Examination) -> Iterator[Problem]:
    """Teacher logits from the three frozen tensors against the model's own, on both paths of training: of EAGLE-1
    (`TargetHead.logits`) and of EAGLE-3 (`ask_teacher`, which also decides what counts by its argmax)."""
    assert x.sample is not None
    head = x.head.to(x.engine.device, x.engine.model.dtype)
    with torch.no_grad():
        own = x.engine.model(input_ids=x.sample.input_ids_L[None].to(x.engine.device), use_cache=False).logits[0]
    last = x.states.last_LH.to(x.engine.device)
    ours = head.logits(last)
    draft_ids = torch.arange(0, len(head.lm_head_VH), 2, device=last.device)  # any part of the vocabulary
    teacher = ask_teacher(head, last, draft_ids)
    problems = list(_compare("teacher logits", ours, own))
    problems += _compare("training's teacher logits", teacher.draft_logits_MVd, own[:, draft_ids])
    # Equal tokens but for near ties: the model's own logit of the chosen token is its largest.
    chosen = own.gather(1, teacher.argmax_M[:, None])[:, 0]
    problems += _compare("logits of the teacher's choice", chosen, own.max(-1).values)
    yield from problems
    if not problems:
        yield "ok", f"equal to the model's own within {_distance(ours, own):.1e} of their size"


def check_final_norm(x: Examination) -> Iterator[Problem]:
    """vLLM hands over the state before the final norm; ours must then be the model's."""
    assert x.sample is not None
    seen: list[Tensor] = []
    layer = find_decoder(x.engine.model)[1][-1]
    hook = layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    try:
        (states,) = x.engine.capture([x.sample])
    finally:
        hook.remove()
    head = x.head.to(x.engine.device)
    normed = head.norm(seen[0][0].to(x.engine.device))
    problems = [
        ("warning", f"{m}; capture with vLLM would be wrong") for _, m in _compare("norm", normed, states.last_LH)
    ]
    yield from problems
    if not problems:
        yield "ok", "norm of the last layer's output is the last hidden state"


def _distance(ours: Tensor, own: Tensor) -> float:
    return float((ours.float().cpu() - own.float().cpu()).abs().max() / own.float().abs().max().clamp(min=1e-6).cpu())


def _compare(what: str, ours: Tensor, own: Tensor) -> Iterator[Problem]:
    """Broken where two tensors differ by more than rounding in the model's dtype, relative to the largest value."""
    if ours.shape != own.shape:
        yield "broken", f"{what}: shape {list(ours.shape)}, the model's own is {list(own.shape)}"
        return
    limit = 1e-4 if own.dtype == torch.float32 else 2e-2
    distance = _distance(ours, own)
    if not distance <= limit:
        yield "broken", f"{what} differ from the model's own by {distance:.1e} of their size (allowed: {limit:.0e})"


# --------------------------------------------------------------------------------------------------- training, decoding


def check_training(x: Examination) -> Iterator[Problem]:
    """Three training steps of a fresh draft on the sample."""
    assert x.sample is not None
    init_random(x.draft)
    left_random = init_from_target(x.draft, x.directory, x.config, x.head)
    draft, device = x.draft.to(x.engine.device), x.engine.device
    head = x.head.to(device, torch.float32)
    batch = collate([x.sample], [x.states.last_LH.cpu()], [x.states.aux_LAH.cpu()]).to(device, torch.float32)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-4)
    losses = []
    for _ in range(3):
        output = draft(batch, head, TTTSettings(num_steps=3))
        optimizer.zero_grad()
        (output.loss / output.counted_K[0].clamp(min=1)).backward()
        optimizer.step()
        losses.append(float(output.loss.detach() / output.counted_K[0].clamp(min=1)))
    moved = " -> ".join(f"{loss:.3f}" for loss in losses)
    if not losses[-1] < losses[0]:
        yield "broken", f"the loss of three steps on one sample does not fall: {moved}"
    else:
        yield "ok", f"loss of three steps {moved}"
    if left_random:
        names = ", ".join(name.removeprefix("midlayer.") for name in left_random)
        yield "ok", f"--init target starts {names} at random (other shape or meaning than the target's)"


def check_decoding(x: Examination) -> Iterator[Problem]:
    """Speculative decoding with the fresh draft must give the target's own greedy tokens."""
    assert x.sample is not None
    model = SpeculativeModel(x.engine.model, x.draft.eval().requires_grad_(False), shape=TreeShape(12, 3, 3))
    first = int(x.sample.loss_mask_L.int().argmax())  # up to the first answer
    prompt = x.sample.input_ids_L[: max(first, 4)].to(x.engine.device)
    output = model.speculative_generate(prompt, max_new_tokens=NUM_DECODED)
    expected = x.engine.model.generate(prompt[None], max_new_tokens=NUM_DECODED, do_sample=False)
    tokens, wanted = output.answers[0].tokens, expected[0, len(prompt) :].tolist()
    if tokens == wanted:
        yield "ok", f"greedy output of the tree equals the model's own, {len(tokens)} tokens"
        return
    at = next((i for i, (a, b) in enumerate(zip(tokens, wanted)) if a != b), min(len(tokens), len(wanted)))
    exact = x.engine.model.dtype == torch.float32
    why = "" if exact else "; in 16 bits near-ties may fall either way, so check with --target-dtype float32"
    yield "broken" if exact else "warning", f"token {at} differs from the model's own greedy output{why}"
