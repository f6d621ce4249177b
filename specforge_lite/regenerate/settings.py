"""All settings of `scripts/generate_data_by_target.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from specforge_lite.core.sections import FIM_ORDER_HELP, Dtype, FimOrder
from specforge_lite.core.settings import Section

OWN_KEYS = ("model", "messages", "prompt", "stream", "n", "max_tokens", "temperature", "top_p", "seed", "tools")


class PromptSection(Section):
    """What is asked, and where the answers go."""

    raw_data_file: Path = Field(
        description="json, jsonl (plain or gzip) or parquet of conversations or fill-in-the-middle rows"
    )
    output_dir: Path = Field(
        description="shard_A-B.jsonl with the answers to rows A..B-1, error_A-B.jsonl with reasons (all: error.jsonl)"
    )
    output_file: Path | None = Field(
        None, description="at the end, also all answered rows as one file, in the order of the input"
    )
    num_per_shard: int = Field(10_000, ge=1, description="input rows per shard")
    sample_size: int | None = Field(None, ge=1, description="stop after so many input rows")
    system_prompt: str | None = Field(None, description="added to conversations that have none")
    resume: bool = Field(True, description="go on where an earlier run on this output directory ended")
    retry_errors: bool = Field(False, description="ask again for the rows that an earlier run gave up")


class BackendSection(Section):
    """Who answers."""

    target_backend: Literal["server", "hf"] = Field(
        "server", description="server: OpenAI-compatible servers; hf: transformers inside this process"
    )
    model_name: str | None = Field(
        None,
        description="name the servers know (default: the only model they list); with hf a directory or hub name",
        json_schema_extra={"flags": ["--model", "--target-model-path"]},
    )
    server_address_port: tuple[str, ...] = Field(
        ("127.0.0.1:30000",), description="HOST:PORT or URL of each server; the key is read from OPENAI_API_KEY"
    )
    max_concurrency: int = Field(
        64, ge=1, description="requests in flight per server", json_schema_extra={"flags": ["--concurrency"]}
    )
    request_timeout: float = Field(600.0, gt=0, description="seconds for one answer, slow drips included")
    max_retries: int = Field(4, ge=0, description="further attempts after time-outs, 429, 5xx and broken replies")
    retry_base_seconds: float = Field(1.0, gt=0, description="first pause before a retry; doubles each time")
    server_wait: float = Field(60.0, ge=0, description="seconds to wait for a server when none is left")
    extra_body: dict[str, Any] = Field(
        {}, description='JSON object added to each request, e.g. {"chat_template_kwargs": {"enable_thinking": true}}'
    )
    tokenizer_path: str | None = Field(
        None, description="directory of the target's tokenizer; needed for fill-in-the-middle rows with servers"
    )
    batch_size: int = Field(64, ge=1, description="rows generated together (hf)")
    target_dtype: Dtype = Field("auto", description="dtype of hf")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model (hf)")

    @field_validator("extra_body", mode="before")
    @classmethod
    def _json_object(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}") from None

    @field_validator("extra_body")
    @classmethod
    def _no_own_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        if own := next((key for key in OWN_KEYS if key in value), None):
            raise ValueError(f"'{own}' is set by the program or has a flag of its own")
        return value

    @model_validator(mode="after")
    def _named_model(self) -> BackendSection:
        if self.target_backend == "hf" and self.model_name is None:
            raise ValueError("model_name: required with --target-backend hf (a directory or hub name)")
        if self.target_backend == "server" and not self.server_address_port:
            raise ValueError("server_address_port: expected at least one HOST:PORT")
        return self


class SamplingSection(Section):
    """How it answers."""

    max_tokens: int = Field(4096, ge=1, description="tokens of one answer at most")
    temperature: tuple[float, ...] = Field(
        (0.0,), description="0 is greedy; of several values each row gets one (seeded)"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens with this much mass")
    seed: int = Field(0, ge=0, description="which row gets which temperature, and its random numbers")
    reasoning: Literal["keep", "drop"] = Field("keep", description="keep reasoning as `reasoning_content`, or drop it")

    fim_order: FimOrder = Field("psm", description=FIM_ORDER_HELP)
    fim_max_length: int = Field(
        2048, ge=16, description="tokens of a fill-in-the-middle prompt and its answer; the code around is cut to fit"
    )

    @field_validator("temperature")
    @classmethod
    def _temperatures(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or min(values) < 0:
            raise ValueError(f"expected one or more numbers >= 0, found {list(values)}")
        return values


class RegenerateConfig(Section):
    """Replace the answers in a data set by the target's own, from servers or in this process."""

    prompts: PromptSection
    backend: BackendSection = BackendSection()
    sampling: SamplingSection = SamplingSection()

    @model_validator(mode="after")
    def _output_is_not_input(self) -> RegenerateConfig:
        output, source = self.prompts.output_file, self.prompts.raw_data_file
        if output is not None and output.resolve() == source.resolve():
            raise ValueError(f"output_file: {output} is the input; choose another name")
        return self
