"""A Hopper GPU that is not there: as much of torch.cuda and of Triton's driver as Inductor and Triton ask while they
compile to sm_90 cubins. Nothing is launched. For a process of its own: `install` cannot be undone.

A no-op device guard under the name CUDA (cuda_guard.cpp) lets a torch without CUDA hold fake tensors on "cuda:0".
Written for torch 2.13.0 and triton 3.7.1.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHARED_MEMORY_LIMIT = 232448  # bytes a block may have on sm_90


class _Properties:
    name = "NVIDIA H100 80GB HBM3"
    major, minor = 9, 0
    total_memory = 80 << 30
    multi_processor_count, warp_size = 132, 32
    regs_per_multiprocessor = 65536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    shared_memory_per_block, shared_memory_per_block_optin = 49152, SHARED_MEMORY_LIMIT
    shared_memory_per_multiprocessor = 233472
    L2_cache_size = 50 << 20
    gcnArchName, is_integrated, uuid = "", 0, "0"
    clock_rate, memory_clock_rate, memory_bus_width = 1980000, 2619000, 5120


class _Stream:
    cuda_stream = 0

    def synchronize(self) -> None: ...


class _Utils:
    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_args, **_kwargs: None

    def load_binary(self, *_args: Any) -> tuple[int, ...]:
        return (0, 0, 128, 0, 1024)  # module, function, registers, spills, threads

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY_LIMIT, "multiprocessor_count": 132, "warpSize": 32, "sm_clock_rate": 1,
            "mem_clock_rate": 1, "mem_bus_width": 1, "max_num_regs": 65536,
        }  # fmt: skip


class _Driver:
    def __init__(self, on_cubin: Callable[[str, int], None]) -> None:
        self.utils = _Utils()
        self._on_cubin = on_cubin

    def launcher_cls(self, _source: Any, metadata: Any) -> None:
        """Of kernels for which Inductor's static launcher is no use."""
        self._on_cubin(metadata.name, metadata.shared)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, *_args: Any) -> tuple[int, int]:
        return (9, 0)

    def get_current_stream(self, *_args: Any) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda:0")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def set_current_device(self, *_args: Any) -> None: ...

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


def install(guard: Path, on_cubin: Callable[[str, int], None]) -> None:
    """Call before torch is imported. guard: the built cuda_guard.so. on_cubin(kernel name, bytes of shared memory)."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    for pattern in ("libgomp*", "libc10.so", "libtorch_cpu.so"):
        for library in libraries.glob(pattern):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(guard), ctypes.RTLD_GLOBAL)
    import torch

    _fake_torch_cuda(torch)
    import triton.backends.nvidia.driver as nvidia
    from triton.runtime import driver

    fake: Any = _Driver(on_cubin)
    driver.set_active(fake)
    type(driver).active = property(lambda _self: fake)  # type: ignore[assignment, method-assign, misc]
    nvidia.CudaUtils = _Utils
    nvidia.CudaDriver.get_current_target = _Driver.get_current_target

    class Launcher:
        @staticmethod
        def _load_kernel(_cubin: Any, name: str, shared: int, _device: int) -> tuple[int, int, int, int]:
            on_cubin(name, shared)
            return (0, 0, 128, 0)

        @staticmethod
        def _launch_kernel(*_args: Any) -> None: ...

    torch._C._StaticCudaLauncher = Launcher


def _fake_torch_cuda(torch: Any) -> None:
    answers: dict[str, Any] = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_properties": _Properties, "get_device_capability": (9, 0), "get_device_name": _Properties.name,
        "synchronize": None, "is_current_stream_capturing": False, "set_device": None, "memory_allocated": 0,
        "_is_compiled": True, "is_bf16_supported": True, "current_stream": _Stream(), "set_rng_state": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_args, answer=answer, **_kwargs: answer)
    torch.cuda.get_rng_state = lambda *_args: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.default_generators = ()
    torch.version.cuda = "13.0"
    for name, answer in {
        "_cuda_getCurrentRawStream": 0, "_cuda_getDevice": 0, "_cuda_exchangeDevice": 0,
        "_cuda_maybeExchangeDevice": 0, "_cuda_setDevice": None, "_cuda_getDeviceCount": 1,
    }.items():  # fmt: skip
        setattr(torch._C, name, lambda *_args, answer=answer: answer)
