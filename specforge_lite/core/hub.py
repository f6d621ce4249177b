"""The only place that reads tokenizers and configs through transformers.

`path` is a local directory or a hub name, `flag` how the user gave it. Code that comes with a model runs only with
`trust_remote_code`. Whatever is wrong with the files is a ConfigError of one line.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specforge_lite.core.errors import ConfigError, SpecforgeError, first_line

TARGET_FLAG = "target_model_path"
# What transformers, safetensors and torch raise for files that are missing, cut off, or not what they should be. They
# have no common base; those of these modules derive from Exception only.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, pickle.PickleError)
_UNREADABLE_MODULES = ("huggingface_hub.", "safetensors", "safetensors_rust", "builtins.SafetensorError")


def load_tokenizer(path: str | Path, trust_remote_code: bool = False, flag: str = TARGET_FLAG) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    with transformers_errors(f"{flag} {path}: cannot load its tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_config(path: str | Path, trust_remote_code: bool = False, flag: str = TARGET_FLAG) -> Any:
    """The config.json of a model as its transformers class."""
    from transformers import AutoConfig

    with transformers_errors(f"{flag} {path}: cannot load its config"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def model_class(config: Any) -> Any:
    """The auto class for a config: causal LMs, else the text-generating models of multimodal families."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in AutoModelForCausalLM._model_mapping or remote
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def local_directory(
    path: str | Path, flag: str = TARGET_FLAG, patterns: Sequence[str] = ("*.json", "*.safetensors")
) -> Path:
    """Directory of a model's files; those of a hub name that fit `patterns` are downloaded as transformers would."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    with transformers_errors(f"{flag} {path}: no such directory, and not from the hub"):
        return Path(snapshot_download(str(path), allow_patterns=list(patterns)))


@contextmanager
def transformers_errors(place: str) -> Iterator[None]:
    """Around transformers' loaders only: what they say about a directory becomes a ConfigError after `place`."""
    try:
        yield
    except SpecforgeError:
        raise
    except Exception as error:  # a foreign library without a base class; what is not about the files is raised again
        module = type(error).__module__
        if not isinstance(error, _UNREADABLE) and not module.startswith(_UNREADABLE_MODULES):
            raise
        if "trust_remote_code" in str(error):
            raise ConfigError(f"{place}: its own code runs only with --trust-remote-code") from None
        raise ConfigError(f"{place}: {first_line(error)}") from None
