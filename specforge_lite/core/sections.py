"""The sections that several commands share. A command composes them, or inherits their flags, in its own config class
and calls `parse_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.config import JsonDict

from specforge_lite.core.settings import Section, flag

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


TARGET_FLAGS: JsonDict = {"flags": ["--model-path", "--base-model-path", "--basepath"]}
DRAFT_FLAGS: JsonDict = {"flags": ["--speculative-draft-model-path"]}


class TargetPathSection(Section):
    """Which target."""

    target_model_path: str = Field(
        description="Hugging Face directory or hub name of the target", json_schema_extra=TARGET_FLAGS
    )
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")


class LocalTargetSection(TargetPathSection):
    """A target that runs inside this process, through transformers."""

    target_dtype: Dtype = flag("auto", "dtype the target runs in; auto: as stored", "--dtype")
    device: str | None = flag(None, "cpu, cuda:1, auto (all GPUs); default: a GPU if there is one")


class EngineFlags(Section):
    """What a serving engine is started with."""

    tp_size: int = flag(1, "tensor-parallel size of the target", ge=1)
    mem_frac: float | None = flag(None, "share of GPU memory the engine may take", "--mem-fraction-static", gt=0, lt=1)
    engine_python: str | None = flag(None, "python interpreter of the engine's environment")
    engine_arg: tuple[str, ...] = flag((), "key=value passed to the engine untouched; may repeat")
    engine_devices: str | None = flag(None, "CUDA_VISIBLE_DEVICES of a launched server, e.g. 0,1")


class DraftPathSection(Section):
    """Which draft."""

    draft_model_path: Path = Field(description="exported draft directory", json_schema_extra=DRAFT_FLAGS)


class TargetSection(TargetPathSection, EngineFlags):
    """The frozen target model and where it runs."""

    target_backend: Literal["auto", "hf", "sglang", "vllm", "fake"] = flag(
        "auto", "engine that runs the target; auto: sglang where installed, else vllm, else hf"
    )
    target_url: tuple[str, ...] = flag((), "attach to running servers instead of launching one")
    target_dtype: Dtype = flag("auto", "dtype the target runs in; auto: as stored")
    aux_layer_ids: tuple[int, ...] | None = flag(
        None, "0-based layers whose OUTPUT feeds the draft; default: chosen from the depth"
    )
    requests_in_flight: int = flag(16, "capture requests in flight per rank", ge=1)
    verify_capture: bool = flag(
        True, "hold a server's hidden states against transformers at start (first layers only, seconds)"
    )
    transport: Literal["tmpfs", "mooncake"] = flag("tmpfs", "how hidden states travel from a server", "--handoff")
    mooncake_address: str | None = flag(None, "HOST:PORT of the mooncake master (--transport mooncake)")
    transport_dir: Path = flag(Path("/dev/shm"), "tmpfs directory for --transport tmpfs", "--handoff-dir")


def _check_fim_order(value: str) -> str:
    if value not in ("psm", "spm") and not all(value.count(text) == 1 for text in ("{prefix}", "{suffix}")):
        raise ValueError("expected psm, spm, or a text with {prefix} and {suffix}, once each")
    return value


FimOrder = Annotated[str, AfterValidator(_check_fim_order)]
FIM_ORDER_HELP = "order of fill-in-the-middle rows: psm, spm, or a literal text with {prefix} and {suffix}"


class DataSection(Section):
    """How conversations become tokens; the key of the dataset cache."""

    train_data_path: str | None = flag(None, "jsonl of conversations", "--trainpath")
    eval_data_path: str | None = flag(None, "jsonl of held-out conversations", "--testpath")
    cache_dir: Path = flag(Path("cache"), "tokenized data and vocabulary maps")
    chat_template: str = flag("auto", "auto, or a name from specforge_lite.data.templates")
    data_format: Literal["auto", "chat", "fim"] = flag("auto", "chat or fill-in-the-middle rows")
    fim_order: FimOrder = flag("psm", FIM_ORDER_HELP)
    max_length: int = flag(2048, "longer samples are cut to this many tokens", ge=8)
    train_only_last_turn: bool = flag(False, "supervise the last assistant turn only")
    system_prompt: str | None = flag(None, "added to conversations that have none")
    build_num_proc: int = flag(
        1, "processes that tokenize", "--num-proc", "--build-dataset-num-proc", "--num-workers", ge=1
    )
