"""The sections that several commands share. A command composes them, or inherits their flags, in its own config class
and calls `parse_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.config import JsonDict

from specforge_lite.core.settings import Section

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


TARGET_FLAGS: JsonDict = {"flags": ["--model-path", "--base-model-path", "--basepath"]}
DRAFT_FLAGS: JsonDict = {"flags": ["--speculative-draft-model-path"]}


class TargetPathSection(Section):
    """Which target."""

    target_model_path: str = Field(
        description="Hugging Face directory or hub name of the target", json_schema_extra=TARGET_FLAGS
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class LocalTargetSection(TargetPathSection):
    """A target that runs inside this process, through transformers."""

    target_dtype: Dtype = Field(
        "auto", description="dtype the target runs in; auto: as stored", json_schema_extra={"flags": ["--dtype"]}
    )
    device: str | None = Field(None, description="cpu, cuda:1, auto (all GPUs); default: a GPU if there is one")


class EngineFlags(Section):
    """What a serving engine is started with."""

    tp_size: int = Field(1, ge=1, description="tensor-parallel size of the target")
    mem_frac: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of GPU memory the engine may take",
        json_schema_extra={"flags": ["--mem-fraction-static"]},
    )
    engine_python: str | None = Field(None, description="python interpreter of the engine's environment")
    engine_arg: tuple[str, ...] = Field((), description="key=value passed to the engine untouched; may repeat")
    engine_devices: str | None = Field(None, description="CUDA_VISIBLE_DEVICES of a launched server, e.g. 0,1")


class DraftPathSection(Section):
    """Which draft."""

    draft_model_path: Path = Field(description="exported draft directory", json_schema_extra=DRAFT_FLAGS)


class TargetSection(TargetPathSection, EngineFlags):
    """The frozen target model and where it runs."""

    target_backend: Literal["auto", "hf", "sglang", "vllm", "fake"] = Field(
        "auto", description="engine that runs the target; auto: sglang where installed, else vllm, else hf"
    )
    target_url: tuple[str, ...] = Field((), description="attach to running servers instead of launching one")
    target_dtype: Dtype = Field("auto", description="dtype the target runs in; auto: as stored")
    aux_layer_ids: tuple[int, ...] | None = Field(
        None, description="0-based layers whose OUTPUT feeds the draft; default: chosen from the depth"
    )
    requests_in_flight: int = Field(16, ge=1, description="capture requests in flight per rank")
    verify_capture: bool = Field(
        True, description="hold a server's hidden states against transformers at start (first layers only, seconds)"
    )
    transport: Literal["tmpfs", "mooncake"] = Field(
        "tmpfs",
        description="how hidden states travel from a server",
        json_schema_extra={"flags": ["--handoff"]},
    )
    mooncake_address: str | None = Field(None, description="HOST:PORT of the mooncake master (--transport mooncake)")
    transport_dir: Path = Field(
        Path("/dev/shm"),
        description="tmpfs directory for --transport tmpfs",
        json_schema_extra={"flags": ["--handoff-dir"]},
    )


def _check_fim_order(value: str) -> str:
    if value not in ("psm", "spm") and not all(value.count(text) == 1 for text in ("{prefix}", "{suffix}")):
        raise ValueError("expected psm, spm, or a text with {prefix} and {suffix}, once each")
    return value


FimOrder = Annotated[str, AfterValidator(_check_fim_order)]
FIM_ORDER_HELP = "order of fill-in-the-middle rows: psm, spm, or a literal text with {prefix} and {suffix}"


class DataSection(Section):
    """How conversations become tokens; the key of the dataset cache."""

    train_data_path: str | None = Field(
        None, description="jsonl of conversations", json_schema_extra={"flags": ["--trainpath"]}
    )
    eval_data_path: str | None = Field(
        None, description="jsonl of held-out conversations", json_schema_extra={"flags": ["--testpath"]}
    )
    cache_dir: Path = Field(Path("cache"), description="tokenized data and vocabulary maps")
    chat_template: str = Field("auto", description="auto, or a name from specforge_lite.data.templates")
    data_format: Literal["auto", "chat", "fim"] = Field("auto", description="chat or fill-in-the-middle rows")
    fim_order: FimOrder = Field("psm", description=FIM_ORDER_HELP)
    max_length: int = Field(2048, ge=8, description="longer samples are cut to this many tokens")
    train_only_last_turn: bool = Field(False, description="supervise the last assistant turn only")
    system_prompt: str | None = Field(None, description="added to conversations that have none")
    build_num_proc: int = Field(
        1,
        ge=1,
        description="processes that tokenize",
        json_schema_extra={"flags": ["--num-proc", "--build-dataset-num-proc", "--num-workers"]},
    )


class CaptureSection(Section):
    """Hidden states on disk."""

    offline_dir: Path = Field(description="directory that receives the hidden states")
    states_dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="precision on disk; fp32 for a target that runs in fp32 and exact repeats"
    )
    shard_mb: int = Field(1024, ge=1, description="size of one file, and of what a killed capture may lose")
    skip_budget: float = Field(0.001, ge=0, le=1, description="share of samples the engine may refuse")
    prefetch_depth: int = Field(4, ge=1, description="capture requests under way")


class MeasureSection(Section):
    """How drafts are evaluated."""

    ttt_length: int = Field(7, ge=1, le=32, description="K, draft steps to evaluate: positions 0 to K-1 of the table")
    chain_length: int = Field(5, ge=1, description="drafted tokens per pass in the acceptance lengths")
    batch_size: int = Field(4, ge=1, description="samples per batch; means and deviations are over batches")
    eval_max_samples: int | None = Field(None, ge=1, description="evaluate on the first so many samples")
    device: str | None = Field(None, description="default: CUDA if there is one")
