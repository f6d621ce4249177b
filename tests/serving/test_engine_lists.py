"""What `make engine-lists` calls a broken list; the lists themselves need a registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

HERE = Path(__file__).resolve().parents[2] / "engine_envs"
spec = importlib.util.spec_from_file_location("check_lists", HERE / "check_lists.py")
assert spec is not None
assert spec.loader is not None
check_lists = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_lists)


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (HERE / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_a_library_that_nothing_brings_is_named() -> None:
    needed = {"libc.so.6", "libcudart.so.13", "libcudart.so.12", "libown.so", "libmlx5.so.1", "libcudart.so.130"}
    assert check_lists.unknown_libraries({"libown.so"}, needed) == ["libcudart.so.12", "libcudart.so.130"]


def test_the_gpu_lists_are_of_one_cuda() -> None:
    assert list(pins("mooncake-gpu.txt")) == ["mooncake-transfer-engine-cuda13"]
    for name in ("vllm-gpu.txt", "sglang-gpu.txt"):
        found = pins(name)
        assert found["nvidia-cuda-runtime"].startswith("13.0.")
        assert found["nvidia-cuda-nvrtc"].startswith("13.0.")
    assert pins("vllm-gpu.txt")["torch"] == "2.13.0"
    assert pins("vllm-gpu.txt")["triton"] == "3.7.1"


def test_install_and_check_name_the_same_debian_packages() -> None:
    text = (HERE / "install.sh").read_text()
    (line,) = [line for line in text.splitlines() if "libraries=(" in line]
    packages = line.partition("(")[2].rstrip(")").split()
    assert f"# As in install.sh: {' '.join(packages)}." in (HERE / "check_lists.py").read_text()
