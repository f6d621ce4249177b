"""Where the hf engine puts a target: one GPU, all of them, or none; an FP8 checkpoint that cannot run is refused."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.import_utils as transformers_imports
from safetensors.torch import load_file, save_file

from specforge_lite.capture import hf, hf_large
from specforge_lite.capture.hf import HfEngine, load_target_model, place_target
from specforge_lite.capture.prefetch import Prefetcher
from specforge_lite.core.devices import on_device
from specforge_lite.core.errors import CheckpointError, ConfigError
from specforge_lite.types import TokenizedSample
from tests.quantized_targets import SCHEMES, quantize

SAMPLE = TokenizedSample("s", torch.arange(9), torch.ones(9, dtype=torch.bool))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A host with `count` GPUs of `size` bytes."""

    def make(count: int, size: int = 80 << 30) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=size))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        for name in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)

    return make


def test_a_target_too_large_for_one_gpu_is_spread(gpus, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    path, size = str(tiny_target), (tiny_target / "model.safetensors").stat().st_size
    gpus(2)
    assert place_target(path, "auto", None) == torch.device("cuda", 0)
    gpus(2, size)
    assert place_target(path, "auto", None) == "auto"
    assert place_target(path, "auto", "cuda:1") == torch.device("cuda", 1)  # asked for by name
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert place_target(path, "auto", None) == torch.device("cuda", 1)  # each rank has one
    gpus(1, size)
    assert place_target(path, "auto", None) == torch.device("cuda", 0)
    gpus(2, 2 * size)
    stored = json.loads((tiny_target / "config.json").read_text())["dtype"]
    expected = "auto" if stored != "float32" else torch.device("cuda", 0)
    assert place_target(path, "float32", None) == expected  # as many bytes as the dtype asked for takes


def test_all_gpus_are_asked_for_by_name(gpus, tiny_target: Path) -> None:  # type: ignore[no-untyped-def]
    for count, place in ((4, "auto"), (1, torch.device("cuda", 0)), (0, torch.device("cpu"))):
        gpus(count)
        assert place_target(str(tiny_target), "auto", "auto") == place


def test_a_part_that_went_to_the_host_is_an_error(gpus, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Without a GPU `device_map="auto"` puts everything on the CPU, as it puts a part there that fits no GPU."""
    model = load_target_model(str(tiny_target), "float32", torch.device("cpu"), False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    monkeypatch.setattr(hf_large, "num_gpus", lambda: 2)
    with pytest.raises(ConfigError, match=r"does not fit into the 2 visible GPUs \(a part is on cpu\); use more"):
        load_target_model(str(tiny_target), "float32", "auto", False)


@pytest.fixture
def fp8_target(tiny_target: Path, tmp_path: Path) -> Path:
    target = Path(shutil.copytree(tiny_target, tmp_path / "fp8"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_fp8_on_a_gpu_needs_a_package(gpus, fp8_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    gpus(1)
    monkeypatch.setattr(transformers_imports, "is_kernels_available", lambda: False)
    for device in (torch.device("cuda", 0), "auto"):
        with pytest.raises(ConfigError, match=r"FP8 checkpoint.*pip install 'kernels>=.*--target-backend") as e:
            load_target_model(str(fp8_target), "auto", device, False)
        assert "\n" not in str(e.value)
    monkeypatch.setattr(transformers_imports, "is_kernels_available", lambda: True)
    hf_large.quantized_loader(hf.load_config(fp8_target), str(fp8_target), torch.device("cuda", 0), False)
    monkeypatch.setattr(transformers_imports, "is_kernels_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))  # dequantised there
    hf_large.quantized_loader(hf.load_config(fp8_target), str(fp8_target), torch.device("cuda", 0), False)


def test_a_quantisation_that_transformers_would_skip_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny_target, tmp_path / "exl9"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "exl9", "bits": 4}
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised as exl9, which transformers does not load; use"):
        load_target_model(str(target), "auto", torch.device("cpu"), False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_weights_are_dequantised_on_a_cpu_beside_a_gpu(
    gpus,  # type: ignore[no-untyped-def]
    tiny_target: Path,
    tmp_path: Path,
    scheme: str,
) -> None:
    """Against the numbers that were packed; what the auto class would have read besides the weights is there."""
    gpus(1)
    expected = quantize(tiny_target, tmp_path / scheme, scheme)
    model = load_target_model(str(tmp_path / scheme), "float32", torch.device("cpu"), False)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.float(), rtol=1e-6, atol=0)
    assert model.generation_config.eos_token_id == [model.config.eos_token_id, model.config.pad_token_id]


def test_a_layer_in_a_form_that_is_not_read_is_named(tiny_target: Path, tmp_path: Path) -> None:
    quantize(tiny_target, tmp_path / "fp8", "fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    del stored["model.layers.3.mlp.up_proj.weight_scale"]
    save_file(stored, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.3\.mlp\.up_proj\.weight is quantised as fp8"):
        load_target_model(str(tmp_path / "fp8"), "float32", torch.device("cpu"), False)


def test_a_thread_that_captures_runs_on_the_engines_device(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new thread's current device is GPU 0, whatever the rank."""
    entered: list[tuple[str, torch.device]] = []

    def record(device: torch.device):  # type: ignore[no-untyped-def]
        entered.append((threading.current_thread().name, device))
        return on_device(device)

    monkeypatch.setattr(hf, "on_device", record)
    engine = HfEngine(str(tiny_target), dtype="float32", device="cpu")
    with Prefetcher(engine, iter([[SAMPLE]]), depth=1) as stream:
        next(stream)
    assert [device for _, device in entered] == [engine.device]
    assert entered[0][0].startswith("prefetch")


def test_the_current_device_is_a_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Recorder)
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        with on_device(device):
            pass
    assert asked == [torch.device("cuda", 3)]
