"""Proves without a GPU that the lists for machines with one can be installed (`make engine-lists`, needs a registry).

Each list must resolve as a whole against its packages' own metadata, and every shared library that the Mooncake wheel
links to must come from the wheel, from torch's packages, from the Debian packages that install.sh names, or from the
driver. Nothing is installed but `uv`, in a temporary environment; the Mooncake wheel (50 MB) is downloaded.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHON, PLATFORM = "3.11", "x86_64-manylinux_2_34"
LISTS = ("vllm-gpu.txt", "sglang-gpu.txt", "mooncake-gpu.txt")
SYSTEM = r"lib(c|m|dl|rt|pthread|resolv|gcc_s|stdc\+\+)\.so\.\d+|ld-linux-x86-64\.so\.2"
TORCH = r"lib(torch|torch_cpu|torch_cuda|torch_python|c10|c10_cuda)\.so|libcudart\.so\.13"
# As in install.sh: libibverbs1 ibverbs-providers librdmacm1 libnuma1 liburing2 libcurl4.
DEBIAN = r"libibverbs\.so\.1|libmlx5\.so\.1|librdmacm\.so\.1|libnuma\.so\.1|liburing\.so\.2|libcurl\.so\.4"
DRIVER = r"libcuda\.so\.1"


def resolve(uv: str, name: str) -> str | None:
    """None if the list resolves, else why not."""
    command = [uv, "pip", "compile", "--quiet", "--python-version", PYTHON, "--python-platform", PLATFORM]
    done = subprocess.run([*command, str(HERE / name)], capture_output=True, text=True)
    return " ".join(done.stderr.split()) if done.returncode else None


def libraries_of(wheel: Path) -> tuple[set[str], set[str]]:
    """(shared libraries that the wheel holds, those that they link to)."""
    needed: set[str] = set()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.search(r"\.so(\.[\d.]+)?$", name)]
        library = Path(folder) / "library.so"
        for name in names:
            library.write_bytes(archive.read(name))  # no name of the archive becomes a path
            text = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
            needed.update(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    return {Path(name).name for name in names}, needed


def unknown_libraries(held: set[str], needed: set[str]) -> list[str]:
    known = re.compile(f"(?:{SYSTEM}|{TORCH}|{DEBIAN}|{DRIVER})$")
    return sorted(name for name in needed - held if not known.match(name))


def main() -> int:
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        uv = shutil.which("uv")
        if uv is None:
            venv.create(Path(folder) / "uv", with_pip=True)
            subprocess.run([str(Path(folder) / "uv/bin/python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
            uv = str(Path(folder) / "uv/bin/uv")
        for name in LISTS:
            problem = resolve(uv, name)
            print(f"{name}: {problem or 'resolves'}")
            problems += [problem] if problem else []
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version",
             PYTHON, "--platform", "manylinux_2_28_x86_64", "-d", folder, "-r", str(HERE / "mooncake-gpu.txt")],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(folder).glob("*.whl")
        unknown = unknown_libraries(*libraries_of(wheel))
        print(f"{wheel.name}: " + (f"links to {', '.join(unknown)}, which nothing brings" if unknown else "links"))
        problems += unknown
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
