"""Everything about SGLang that this project relies on (read in sglang 0.5.23): its flags, requests, replies, counts.

Its layer ids are layer outputs, as ours; the last hidden state comes after the final norm. An upgrade changes this
file, the plugin's sglang_plugin.py and engine_envs/sglang-*.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import ConfigError, EngineError
from specforge_lite.core.http import HttpLoop
from specforge_lite.model.config_json import block_kind_of
from specforge_lite.serving.engine import (
    Engine,
    Generation,
    Launch,
    ServingOptions,
    Support,
    by_family,
    cpu_thread_binding,
    engine_arg,
    read_draft_config,
    refuse_reported_error,
    without_compiler,
)

# With CUDA graphs of the prefill the last hidden states are those of another batch, and nothing reports it.
NO_GRAPHS = ["--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
MAX_POOLED_TOKENS_CPU = 32768
PAGE_TOKENS = 128  # a multiple of every page size
NO_AUX = Support("refused", "it hands out no aux hidden states")
# Their models take the ids as layer inputs unless the first one is 1, in capture and in EAGLE-3 serving.
FIRST_ID_ONE = Support("read", "aux layer ids must start at 1")


class Sglang(Engine):
    """SGLang."""

    name = "sglang"
    distributions = ("sglang",)
    versions = ("0.5.23", "0.6")
    identify_path = "/get_model_info"
    registry_query = """
import json, sys
from sglang.srt.models.registry import ModelRegistry
model = ModelRegistry.models.get(sys.argv[1])
print(json.dumps({"known": model is not None, "eagle3": hasattr(model, "set_eagle3_layers_to_capture")}))
"""
    support = by_family(
        {
            Support("run"): ("Llama 2, 3", "Qwen 3 MoE"),
            Support("read"): (
                "Llama 4", "Mistral, Ministral", "Qwen 2, 2.5", "Qwen 3", "Qwen 2 MoE", "Qwen 3 Next",
                "Qwen 2.5 VL, 3 VL", "Phi 3, 4", "Gemma 4", "gpt-oss", "GLM 4 MoE", "MiniMax M2",
            ),
            NO_AUX: (
                "Mistral 3 (vision)", "Mixtral", "Phi 2", "Phi MoE", "Gemma 2", "GLM 4", "MiniCPM 4", "Cohere",
                "Granite", "OLMo 1, 2, 3", "Nemotron H",
            ),
            Support("refused", "it hands out what one layer adds, without the residual stream (to drafts, too)"): (
                "Gemma 3",
            ),
            FIRST_ID_ONE: ("DeepSeek V2, V3, R1", "Kimi K2.5", "GLM 4 MoE Lite", "GLM MoE DSA"),
        }
    )  # fmt: skip
    draft_algorithms = {
        "LlamaForCausalLMEagle3": "EAGLE3",
        "LlamaForCausalLMEagle": "EAGLE",
        "DFlashDraftModel": "DFLASH",
        "Qwen3DSparkModel": "DSPARK",
    }
    cumulative_stream = True
    greedy_on_cpu = True  # eagle_utils.py, _verify_uses_greedy

    # ------------------------------------------------------------------------------------------------------- starting
    def capture_command(self, launch: Launch, info: TargetInfo) -> list[str]:
        words = self._command(launch)
        # The algorithm only names the convention of the layer ids here; no draft is loaded.
        words += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
        words += ["--return-aux-hidden-state-layer-ids", *(str(i) for i in info.aux_layer_ids)]
        # A cached prefix or a chunk of a prompt would leave rows out.
        words += ["--disable-radix-cache", *_whole_prompts(launch), *NO_GRAPHS]
        if not launch.gpu:
            wanted = launch.concurrency * launch.max_length
            pooled = max(2 * launch.max_length, min(MAX_POOLED_TOKENS_CPU, wanted))
            words += ["--max-total-tokens", str(pooled), "--attention-backend", "torch_native"]
        return words

    def serving_command(self, launch: Launch) -> list[str]:
        words = self._command(launch)
        words += ["--max-running-requests", str(launch.concurrency)]
        if launch.speculative:
            draft = read_draft_config(launch.draft_path)
            resolved = replace(launch, draft_path=str(Path(str(launch.draft_path)).resolve()))
            words += self.speculative_words(resolved, draft, launch.gpu)
        if not launch.gpu:
            tokens = max(2, launch.concurrency) * (launch.max_length + launch.num_draft_tokens * launch.topk)
            words += [*NO_GRAPHS, "--max-total-tokens", str(min(tokens, 4 * MAX_POOLED_TOKENS_CPU))]
            words += ["--attention-backend", "torch_native"]
            if launch.speculative:  # the only CPU attention that knows draft trees
                words += ["--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx"]
        return words

    def speculative_words(self, options: ServingOptions, draft: dict[str, Any], gpu: bool = True) -> list[str]:
        algorithm = self.draft_algorithm(options, draft)
        words = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(options.draft_path)]
        if algorithm in ("DFLASH", "DSPARK"):
            # speculative_hook.py: steps and topk are 1 there, and the verified window is the block's tokens plus one.
            if not gpu:
                raise ConfigError(f"{options.draft_path}: sglang serves {algorithm.lower()} drafts on a GPU only")
            size = "--speculative-num-draft-tokens" if algorithm == "DSPARK" else "--speculative-dflash-block-size"
            return [*words, size, str(options.num_steps + 1)]
        words += ["--speculative-num-steps", str(options.num_steps), "--speculative-eagle-topk", str(options.topk)]
        words += ["--speculative-num-draft-tokens", str(options.num_draft_tokens)]
        return words + (["--speculative-use-rejection-sampling"] if self.draws(options, draft, gpu) else [])

    def sampling_problem(self, draft: dict[str, Any], topk: int, gpu: bool) -> str | None:
        """eagle_worker_v2.py and speculative_hook.py refuse to start with the flag in all these cases but on a CPU,
        where eagle_utils.py verifies greedily."""
        whole, kept = int(draft.get("vocab_size") or 0), int(draft.get("draft_vocab_size") or 0)
        if not gpu:
            return "on a CPU sglang verifies greedily"
        if (kind := block_kind_of(draft)) is not None:
            return f"sglang draws {kind} drafts its own way"
        if topk != 1:
            return "sglang draws chains only (TOPK 1)"
        if kept and kept != whole:
            return f"sglang draws only from the target's whole vocabulary, the draft has {kept} of {whole} tokens"
        return None

    def _command(self, launch: Launch) -> list[str]:
        words = [launch.python, "-m", "sglang.launch_server", "--model-path", launch.model_path]
        words += ["--host", launch.host, "--port", str(launch.port), "--tp-size", str(launch.tp_size)]
        words += ["--dtype", launch.dtype, "--context-length", str(launch.max_length), "--skip-server-warmup"]
        if launch.trust_remote_code:
            words.append("--trust-remote-code")
        if not launch.gpu:  # an idle scheduler polls without pause, which takes a core from the trainer
            words += ["--device", "cpu", "--sleep-on-idle"]
        elif launch.dtype == "float32":  # its defaults, fa3 on Hopper and flashinfer elsewhere, take 16 bits only
            words += ["--attention-backend", "triton"]
        mem_frac = launch.mem_frac or (None if launch.gpu else 0.1)
        return words + (["--mem-fraction-static", str(mem_frac)] if mem_frac is not None else [])

    def target_problem(self, support: Support | None, text_config: Any, info: TargetInfo, dtype: str) -> str | None:
        ids = list(info.aux_layer_ids)
        if support != FIRST_ID_ONE or ids[0] == 1:
            return None
        return (
            f"aux_layer_ids {ids}: it captures the outputs of layers {[i - 1 for i in ids]} instead, here and when it"
            f" serves the draft; give ids that start at 1, e.g. --aux-layer-ids 1 {' '.join(map(str, ids[1:]))}"
        )

    def environment(self, launch: Launch) -> dict[str, str]:
        env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # a few tokens beside the longest sample
        if launch.gpu:
            return env
        threads, binding = cpu_thread_binding(launch.tp_size)
        env |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads)} | without_compiler()
        return env | ({"SGLANG_CPU_OMP_THREADS_BIND": binding} if launch.tp_size > 1 else {})

    # -------------------------------------------------------------------------------------------------------- capture
    def capture_request(self, token_ids: list[int], key: str) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": 1, "temperature": 0.0, "custom_params": {"specforge_capture": key}}
        return "/generate", {"input_ids": token_ids, "sampling_params": params, "return_hidden_states": True}

    def capture_reply(self, reply: dict[str, Any]) -> tuple[dict[str, Any] | None, int | None]:
        next_token = int(reply["output_ids"][0]) if reply.get("output_ids") else None
        states = reply.get("meta_info", {}).get("hidden_states")
        if not states or not isinstance(states[0], dict):
            return None, next_token  # lists of floats: sglang logs a plugin that fails to load, and goes on without it
        return states[0].get("specforge_capture"), next_token

    def output_layer_ids(self, server_layer_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(server_layer_ids)

    async def read_max_length(self, http: HttpLoop, url: str) -> int:
        found = await http.get_json(url + "/get_server_info")
        self.check_version(str(found.get("version")))
        if not found.get("enable_return_aux_hidden_states"):
            raise EngineError(f"{url}: sglang was started without --enable-return-aux-hidden-states")
        if not found.get("disable_radix_cache"):
            raise EngineError(f"{url}: sglang drops cached rows; start it with --disable-radix-cache")
        longest, chunk = int(found["max_req_input_len"]), int(found.get("chunked_prefill_size") or -1)
        if chunk > 0 and (chunk < longest or found.get("prefill_max_requests") != 1):
            raise EngineError(f"{url}: sglang drops rows of chunks; start it with --chunked-prefill-size -1")
        for phase in ("decode", "prefill"):
            backend = found.get("cuda_graph_config", {}).get(phase, {}).get("backend", "disabled")
            if backend != "disabled":
                raise EngineError(
                    f"{url}: sglang returns other rows as last hidden states with CUDA graphs ({phase}: {backend});"
                    f" start it with {' '.join(NO_GRAPHS)}"
                )
        return longest

    # ------------------------------------------------------------------------------------------------------- decoding
    def generate_request(
        self, token_ids: Sequence[int], max_tokens: int, temperature: float, ignore_eos: bool = False
    ) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
        return "/generate", {"input_ids": list(token_ids), "sampling_params": params}

    def read_generation(self, chunks: Sequence[dict[str, Any]], speculative: bool) -> Generation:
        refuse_reported_error(self.name, chunks[-1])
        found, tokens = chunks[-1]["meta_info"], tuple(chunks[-1]["output_ids"])
        if len(tokens) != found.get("completion_tokens", len(tokens)):
            raise ValueError(f"{len(tokens)} token ids, completion_tokens {found['completion_tokens']}")
        # [n] of the histogram: passes that accepted n drafted tokens
        histogram = list(found.get("spec_correct_drafts_histogram") or []) if speculative else []
        return Generation(
            tokens,
            passes=int(found.get("spec_verify_ct", 0)) if speculative else None,
            accepted_at=tuple(sum(histogram[n:]) for n in range(1, len(histogram))),
            finish_reason=str((found.get("finish_reason") or {}).get("type", "")),
            num_first_tokens=len(chunks[0]["output_ids"]),
        )

    def flush_request(self) -> tuple[str, str] | None:
        return "POST", "/flush_cache?timeout=30"  # refused while the last answer's request is not yet released


def _whole_prompts(launch: Launch) -> list[str]:
    """Flags that keep a prompt in one forward pass. FlashInfer's MoE all-to-all refuses to run without chunks: then one
    prompt per batch, in chunks (of whole pages) that hold the longest."""
    if engine_arg(launch.engine_args, "moe-a2a-backend") != "flashinfer":
        return ["--chunked-prefill-size", "-1"]
    chunk = -(-launch.max_length // PAGE_TOKENS) * PAGE_TOKENS
    return ["--chunked-prefill-size", str(chunk), "--prefill-max-requests", "1"]
