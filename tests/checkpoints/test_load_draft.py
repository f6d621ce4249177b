"""`load_draft` on every layout in use: ours, SafeAILab/EAGLE, speculators, a training checkpoint; and on bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, silu

from specforge_lite.checkpoints.export import export_checkpoint, exported_config
from specforge_lite.checkpoints.loading import load_draft
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.core.files import sha256_of
from specforge_lite.model.config_json import config_from_values
from specforge_lite.model.draft import Draft
from tests.inference_drafts import random_draft

KEY = "eagle_aux_hidden_state_layer_ids"


def write_pickled(folder: Path, draft: Draft, rename: tuple[str, str] = ("", ""), **config_changes) -> Path:
    """A directory as SafeAILab/EAGLE publishes them: pytorch_model.bin, no aux ids, no target width."""
    folder.mkdir()
    config = exported_config(draft.config, "float32")
    for key in ("aux_layer_ids", KEY, "eagle_config", "target_hidden_size", "specforge_lite", "rope_parameters"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}))
    tensors = {name.replace(*rename): tensor for name, tensor in draft.state_dict().items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def same_weights(first: Draft, second: Draft) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("rename", [("", ""), ("midlayer.", "layers.0.")])
def test_eagle_checkpoint(tmp_path: Path, rename: tuple[str, str]) -> None:
    draft = random_draft()
    loaded = load_draft(write_pickled(tmp_path / "d", draft, rename))
    assert same_weights(draft, loaded)
    assert loaded.config.aux_layer_ids is None  # left to the default of the target's depth


def test_the_targets_table_in_a_checkpoint_is_left_out(tmp_path: Path) -> None:
    draft = random_draft()
    folder = write_pickled(tmp_path / "d", draft)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**tensors, "embed_tokens.weight": torch.zeros(100, 32)}, folder / "pytorch_model.bin")
    assert same_weights(draft, load_draft(folder))


def test_missing_t2d_is_derived(tmp_path: Path) -> None:
    draft = random_draft()
    folder = write_pickled(tmp_path / "d", draft)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del tensors["t2d"]
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load_draft(folder).t2d, draft.t2d)


AUX_KEYS: list[tuple[dict, tuple[int, ...]]] = [
    ({KEY: [2, 4, 5]}, (1, 3, 4)),  # vLLM's key: layer inputs
    ({"eagle_config": {KEY: [1, 3, 4]}}, (1, 3, 4)),  # SGLang's key: layer outputs
    ({"eagle_config": {KEY: [2, 4, 5]}}, (2, 4, 5)),
    ({KEY: [2, 4, 5], "eagle_config": {KEY: [1, 3, 4]}}, (1, 3, 4)),  # as we export
    ({"aux_layer_ids": [0, 2, 3], KEY: [2, 4, 5]}, (0, 2, 3)),  # ours decides
]


def vllm_captures(config: dict) -> list[int] | None:
    """Outputs that vLLM 0.32 hands to the draft: `_get_eagle3_aux_layers_from_config` names layer inputs."""
    ids = config.get(KEY) or (config.get("eagle_config") or {}).get(KEY)
    return [i - 1 for i in ids] if ids else None


def sglang_captures(config: dict) -> list[int] | None:
    """SGLang 0.5.23: `_resolve_eagle_aux_hidden_state` reads eagle_config, `set_eagle3_layers_to_capture` adds 1 to
    capture in front of the next layer, which is this one's output."""
    return (config.get("eagle_config") or {}).get(KEY)


@pytest.mark.parametrize(("keys", "expected"), AUX_KEYS)
def test_aux_layer_ids_of_either_convention(tmp_path: Path, keys: dict, expected: tuple[int, ...]) -> None:
    folder = write_pickled(tmp_path / "d", random_draft(), **keys)
    assert load_draft(folder).config.aux_layer_ids == expected
    shape = {**json.loads((folder / "config.json").read_text()), **keys}
    assert config_from_values(shape).aux_layer_ids == expected  # the reader of --draft-model-config


@pytest.mark.parametrize("outputs", [(1, 3, 4), (0, 2, 6), (2, 15, 28)])
def test_both_engines_capture_what_we_read(tmp_path: Path, outputs: tuple[int, ...]) -> None:
    config = exported_config(random_draft(aux_layer_ids=outputs).config, "float32")
    assert vllm_captures(config) == sglang_captures(config) == list(outputs)
    for key in ("aux_layer_ids", KEY, "eagle_config"):
        alone = {k: v for k, v in config.items() if k == key or k not in ("aux_layer_ids", KEY, "eagle_config")}
        assert config_from_values(alone).aux_layer_ids == outputs


def test_keys_that_mean_different_layers_are_refused(tmp_path: Path) -> None:
    keys = {KEY: [2, 4, 5], "eagle_config": {KEY: [2, 4, 5]}}
    folder = write_pickled(tmp_path / "d", random_draft(), **keys)
    with pytest.raises(ConfigError, match=r"outputs of layers \[1, 3, 4\], .* those of \[2, 4, 5\]; correct one"):
        load_draft(folder)


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = write_pickled(tmp_path / "d", random_draft())
    torch.save({"fc.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a file of plain tensors"):
        load_draft(folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("norm.weight"), r"missing norm.weight"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), r"no place for extra"),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(7)}), r"norm.weight has shape \(7,\)"),
        (lambda tensors: tensors.pop("d2t"), r"d2t is missing, and the draft vocabulary 40"),
        (lambda tensors: tensors["d2t"].add_(90), r"d2t names target ids"),
    ],
)
def test_bad_tensors(tmp_path: Path, change, message: str) -> None:
    folder = write_pickled(tmp_path / "d", random_draft())
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        load_draft(folder)


# -------------------------------------------------------------------------------------------- speculators


def write_speculators(folder: Path, draft: Draft, extra: dict[str, Tensor], **changes) -> Path:
    folder.mkdir()
    layer = exported_config(draft.config, "float32")
    for key in ("aux_layer_ids", KEY, "eagle_config", "draft_vocab_size", "architectures", "target_hidden_size"):
        layer.pop(key, None)
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "draft_vocab_size": draft.config.draft_vocab_size,
        KEY: [2, 4, 5, 8],  # the last layer is listed for the verifier's own state
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name.replace("midlayer.", "layers.0."): t.contiguous() for name, t in draft.state_dict().items()}
    save_file({**tensors, **extra, "embed_tokens.weight": torch.zeros(100, 32)}, folder / "model.safetensors")
    return folder


def test_speculators_directory(tmp_path: Path) -> None:
    draft = random_draft()
    loaded = load_draft(write_speculators(tmp_path / "d", draft, {}, norm_before_residual=False))
    assert same_weights(draft, loaded)
    assert loaded.config.aux_layer_ids == (1, 3, 4)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def test_speculators_variants_against_a_plain_layer(tmp_path: Path) -> None:
    """norm_before_residual, norm_before_fc and per-head norms; attention to itself only, position 0: no RoPE."""
    draft = random_draft()
    extra = {
        "input_norm.weight": torch.rand(96) + 0.5,
        "layers.0.self_attn.q_norm.weight": torch.rand(8) + 0.5,
        "layers.0.self_attn.k_norm.weight": torch.rand(8) + 0.5,
    }
    loaded = load_draft(write_speculators(tmp_path / "d", draft, extra, norm_before_residual=True, norm_before_fc=True))
    w = draft.state_dict()
    features, embeds = torch.randn(1, 1, 96), torch.randn(1, 1, 32)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q, k))
        return v.repeat_interleave(2, 1)

    state = loaded.first_state(features)
    torch.testing.assert_close(state, linear(rms(features, extra["input_norm.weight"]), w["fc.weight"]))
    after, head_input = loaded.step(state, embeds, torch.zeros(1, 1, dtype=torch.int64), attend)

    normed = rms(state, w["midlayer.hidden_norm.weight"])
    x = torch.cat([rms(embeds, w["midlayer.input_layernorm.weight"]), normed], -1)
    q = linear(x, w["midlayer.self_attn.q_proj.weight"]).view(1, 1, 4, 8)
    v = linear(x, w["midlayer.self_attn.v_proj.weight"]).view(1, 1, 2, 8).repeat_interleave(2, 2).flatten(2)
    h = normed + linear(v, w["midlayer.self_attn.o_proj.weight"])
    inner = rms(h, w["midlayer.post_attention_layernorm.weight"])
    gate = silu(linear(inner, w["midlayer.mlp.gate_proj.weight"])) * linear(inner, w["midlayer.mlp.up_proj.weight"])
    h = h + linear(gate, w["midlayer.mlp.down_proj.weight"])
    torch.testing.assert_close(seen[0][0], rms(q, extra["layers.0.self_attn.q_norm.weight"]).transpose(1, 2))
    torch.testing.assert_close(after, h)
    torch.testing.assert_close(head_input, rms(h, w["norm.weight"]))


def test_other_speculators_are_refused(tmp_path: Path) -> None:
    folder = write_speculators(tmp_path / "d", random_draft(), {}, speculators_model_type="dflash")
    with pytest.raises(CheckpointError, match="only eagle3 is read"):
        load_draft(folder)


# ------------------------------------------------------------------------------------- training checkpoint


def write_checkpoint(folder: Path, draft: Draft, step: int = 12) -> Path:
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in draft.state_dict().items()}, folder / "draft.safetensors")
    documents = {
        "draft_config.json": draft.config.to_dict(),
        "state.json": {"step": step, "data": {}, "counters": {}, "world_size": 1},
        "provenance.json": {"python": "3.11"},
    }
    for name, value in documents.items():
        (folder / name).write_text(json.dumps(value))
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    return folder


def test_a_training_checkpoint_loads_and_exports(tmp_path: Path) -> None:
    draft = random_draft(norm_output=True)
    write_checkpoint(tmp_path / "run" / "step_3", random_draft(seed=5), step=3)
    newest = write_checkpoint(tmp_path / "run" / "step_12", draft)
    assert same_weights(draft, load_draft(newest))
    exported = export_checkpoint(tmp_path / "run", tmp_path / "out", dtype="float32")
    again = load_draft(exported)
    assert same_weights(draft, again)
    assert again.config == draft.config
    facts = json.loads((exported / "config.json").read_text())["specforge_lite"]
    assert (facts["step"], facts["provenance"]) == (12, {"python": "3.11"})


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step_12", random_draft())
    weights = bytearray((folder / "draft.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "draft.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="sha256"):
        export_checkpoint(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out")
