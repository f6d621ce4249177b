"""SGLang as a target: its flags for capture, its request and its reply (sglang 0.5.23)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specforge_lite.capture.context import EngineContext
from specforge_lite.core.errors import EngineError
from specforge_lite.core.http import HttpLoop
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.environment import check_version
from specforge_lite.serving.launch import Launch, Launcher, cpu_thread_binding, open_remote, without_compiler
from specforge_lite.serving.remote import RemoteEngine, ServerFacts

# An idle scheduler polls without pause, and on a CPU that takes a core from the trainer.
CPU_FLAGS = ["--device", "cpu", "--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"]
CPU_FLAGS += ["--sleep-on-idle"]  # an idle scheduler polls without pause, which takes a core from the trainer
MOST_POOLED_TOKENS_CPU = 32768


class SglangDialect:
    """Layer ids are layer outputs, as ours; the last hidden state comes after the final norm."""

    name = "sglang"
    health_path = "/health"

    def capture_request(self, token_ids: list[int], key: str) -> tuple[str, dict[str, Any]]:
        params = {"max_new_tokens": 1, "temperature": 0.0, "custom_params": {"specforge_capture": key}}
        return "/generate", {"input_ids": token_ids, "sampling_params": params, "return_hidden_states": True}

    def capture_reply(self, reply: dict[str, Any]) -> dict[str, Any] | None:
        states = reply.get("meta_info", {}).get("hidden_states")
        if not states or not isinstance(states[0], dict):
            return None  # lists of floats: sglang logs a plugin that fails to load, and goes on without it
        found: dict[str, Any] | None = states[0].get("specforge_capture")
        return found

    def output_layer_ids(self, server_layer_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(server_layer_ids)

    async def read_facts(self, http: HttpLoop, url: str) -> ServerFacts:
        facts = await http.get_json(url + "/get_server_info")
        version = str(facts.get("version"))
        check_version("sglang", version)
        if not facts.get("enable_return_aux_hidden_states"):
            raise EngineError(f"{url}: sglang was started without --enable-return-aux-hidden-states")
        if not facts.get("disable_radix_cache"):
            raise EngineError(f"{url}: sglang drops cached rows; start it with --disable-radix-cache")
        if (facts.get("chunked_prefill_size") or -1) > 0:
            raise EngineError(f"{url}: sglang drops rows of chunks; start it with --chunked-prefill-size -1")
        return ServerFacts(version, int(facts["max_req_input_len"]))


def capture_command(launch: Launch) -> list[str]:
    """The server's command line, without what the user adds."""
    target = launch.target
    words = [launch.python, "-m", "sglang.launch_server", "--model-path", target.target_model_path]
    words += ["--host", launch.host, "--port", str(launch.port), "--tp-size", str(target.tp_size)]
    words += ["--dtype", target.target_dtype, "--context-length", str(launch.context_length)]
    # The algorithm only names the convention of the layer ids here; no draft is loaded.
    words += ["--enable-return-aux-hidden-states", "--speculative-algorithm", "EAGLE3"]
    words += ["--return-aux-hidden-state-layer-ids", *(str(i) for i in launch.info.aux_layer_ids)]
    # A cached prefix or a chunk of a prompt would leave rows out.
    words += ["--disable-radix-cache", "--chunked-prefill-size", "-1", "--skip-server-warmup"]
    if target.trust_remote_code:
        words.append("--trust-remote-code")
    mem_frac = target.mem_frac
    if not launch.gpu:
        mem_frac = mem_frac or 0.1
        wanted = launch.num_ranks * target.requests_in_flight * launch.context_length
        pooled = max(2 * launch.context_length, min(MOST_POOLED_TOKENS_CPU, wanted))
        words += [*CPU_FLAGS, "--attention-backend", "torch_native", "--max-total-tokens", str(pooled)]
    if mem_frac is not None:
        words += ["--mem-fraction-static", str(mem_frac)]
    return words


def server_env(launch: Launch) -> dict[str, str]:
    """Environment of the server, over ours."""
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}  # a few tokens beside the longest sample
    if not launch.gpu:
        env |= cpu_env(launch.target.tp_size)
    return env


def cpu_env(tp_size: int) -> dict[str, str]:
    """What sglang's CPU engine needs in its environment."""
    threads, binding = cpu_thread_binding(tp_size)
    env = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads)} | without_compiler()
    if tp_size > 1:
        env["SGLANG_CPU_OMP_THREADS_BIND"] = binding
    return env


LAUNCHER = Launcher(SglangDialect(), capture_command, server_env)


def open_sglang(target: TargetSection, context: EngineContext) -> RemoteEngine:
    """Launch SGLang, or attach to it at `--target-url`."""
    return open_remote(LAUNCHER, target, context)
