"""The start-up probe: right states of every family pass, each way of being wrong is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge_lite.capture.hf import HfEngine
from specforge_lite.capture.remote import ProbeReply
from specforge_lite.core.errors import CaptureError
from specforge_lite.core.hub import load_config
from specforge_lite.model.target_head import load_target_head
from specforge_lite.serving import probe
from specforge_lite.serving.probe import verify_capture
from specforge_lite.types import CapturedStates, TokenizedSample
from tests.target_families import FAMILIES, REMOTE_FAMILIES, save_family

MakeReplies = Callable[..., list[ProbeReply]]


def replies_of(path: Path, aux: tuple[int, ...] = (1, 2), trust: bool = False) -> list[ProbeReply]:
    """What a right server would answer: states of the whole model and its greedy token, for two probes."""
    engine = HfEngine(str(path), aux_layer_ids=aux, dtype="float32", device="cpu", trust_remote_code=trust)
    replies = []
    for number in range(2):
        ids = torch.arange(16) * (7 + number) % 96
        (states,) = engine.capture([TokenizedSample("probe", ids, ids >= 0)])
        with torch.no_grad():
            logits = engine.model(input_ids=ids[None], use_cache=False).logits[0, -1]
        replies.append(ProbeReply("http://h:1", states, int(logits.argmax())))
    engine.close()
    return replies


@pytest.mark.parametrize("family", FAMILIES)
def test_right_states_of_every_family_pass(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trust = family in REMOTE_FAMILIES
    path = save_family(family, tmp_path)
    verify_capture(replies_of(path, trust=trust), str(path), trust)
    logged = capsys.readouterr()
    assert "captured states equal transformers': layer 1 and the next token" in logged.out + logged.err
    assert "warning" not in logged.out + logged.err


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def right(target: Path) -> list[ProbeReply]:
    return replies_of(target)


def with_aux(replies: list[ProbeReply], change: Callable[[int, CapturedStates], torch.Tensor]) -> list[ProbeReply]:
    changed = []
    for place, reply in enumerate(replies):
        aux = reply.states.aux_LAH.clone()
        aux[:, 0] = change(place, reply.states)
        changed.append(replace(reply, states=replace(reply.states, aux_LAH=aux)))
    return changed


def test_the_output_of_another_layer(target: Path, right: list[ProbeReply]) -> None:
    earlier = replies_of(target, (0, 2))
    wrong = with_aux(right, lambda place, _: earlier[place].states.aux_LAH[:, 0])
    with pytest.raises(CaptureError, match=r"aux layer 1: .* it is the output of layer 0: other layer ids are meant"):
        verify_capture(wrong, str(target), False)


def test_a_scaled_stream(target: Path, right: list[ProbeReply]) -> None:
    wrong = with_aux(right, lambda _, states: states.aux_LAH[:, 0] / 2.5)
    with pytest.raises(CaptureError, match=r"aux layer 1: .* that output times 0.4: the engine scales the residual"):
        verify_capture(wrong, str(target), False)


def test_a_layer_s_part_without_the_residual_stream(target: Path, right: list[ProbeReply]) -> None:
    earlier = replies_of(target, (0, 2))
    wrong = with_aux(right, lambda place, states: states.aux_LAH[:, 0] - earlier[place].states.aux_LAH[:, 0])
    with pytest.raises(CaptureError, match=r"aux layer 1: .* the engine may keep the residual stream apart"):
        verify_capture(wrong, str(target), False)


@pytest.mark.parametrize("wrong", ["unnormed", "twice normed", "other head"])
def test_a_last_state_that_does_not_predict_the_servers_token(
    wrong: str, target: Path, right: list[ProbeReply], tmp_path: Path
) -> None:
    head = load_target_head(target, load_config(target))
    replies = []
    for reply in right:
        last = reply.states.last_LH
        if wrong == "unnormed":  # a negative weight somewhere makes it another direction
            last = last / head.norm_weight_H * torch.linspace(-2, 2, last.shape[1])
        if wrong == "twice normed":
            last = last * head.norm_weight_H * torch.linspace(0, 3, last.shape[1]).square()
        token = (reply.next_token or 0) + 1 if wrong == "other head" else reply.next_token
        replies.append(replace(reply, states=replace(reply.states, last_LH=last), next_token=token))
    with pytest.raises(CaptureError, match=r"last hidden state: it predicts token .* likely the final norm"):
        verify_capture(replies, str(target), False)


def test_states_in_bf16_pass(target: Path, right: list[ProbeReply]) -> None:
    half = [
        replace(r, states=replace(r.states, aux_LAH=r.states.aux_LAH.bfloat16(), last_LH=r.states.last_LH.bfloat16()))
        for r in right
    ]
    verify_capture(half, str(target), False)


def test_of_quantised_weights_the_last_state_only_is_compared(
    target: Path, right: list[ProbeReply], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(target, tmp_path / "quantised")
    path = tmp_path / "quantised" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    verify_capture(with_aux(right, lambda _, states: states.aux_LAH[:, 0] * 2), str(path.parent), False)
    assert "quantised weights; the server's aux states are not held against transformers" in capsys.readouterr().err
    with pytest.raises(CaptureError, match="last hidden state"):
        verify_capture([replace(right[0], next_token=(right[0].next_token or 0) + 1)], str(path.parent), False)


def test_layers_that_are_too_large_to_read_are_left_out(
    target: Path, right: list[ProbeReply], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "MAX_REFERENCE_BYTES", 1000)
    verify_capture(with_aux(right, lambda _, states: states.aux_LAH[:, 0] * 2), str(target), False)
    assert "aux layer 1 is not held against transformers: the layers up to it are" in capsys.readouterr().err
    token = (right[0].next_token or 0) + 1
    with pytest.raises(CaptureError, match="last hidden state"):
        verify_capture([replace(right[0], next_token=token)], str(target), False)
