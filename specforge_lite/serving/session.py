"""Serving an exported draft in the real engine: start it, generate over HTTP, read the acceptance it reports.

with ServingSession(ServingOptions("sglang", model_path, draft_path, num_steps=3)) as session:
    run = session.generate(prompts, max_tokens=128)
    print(run.tokens_per_second, session.acceptance().length)
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.core.http import BadReply, HttpLoop, HttpStatus, ServerGone
from specforge_lite.core.log import progress
from specforge_lite.serving import sglang, vllm
from specforge_lite.serving.environment import find_interpreter, has_gpu
from specforge_lite.serving.launch import engine_arg_words
from specforge_lite.serving.process import LaunchedServer, RunDirectory, ServerSpec, collect_leftovers, free_port

SHARED_MEMORY = Path("/dev/shm")
# Class names in a draft's config.json -> what (SGLang, vLLM) call the algorithm.
ALGORITHMS = {"LlamaForCausalLMEagle3": ("EAGLE3", "eagle3"), "LlamaForCausalLMEagle": ("EAGLE", "eagle")}


@dataclass(frozen=True)
class ServingOptions:
    """What to serve. num_steps 0 or no draft_path: plain decoding.

    num_steps: tokens a chain drafts; topk: branches per step; num_draft_tokens: nodes verified at once, the last
    accepted token included (SGLang's words). max_length: tokens of prompt plus answer. concurrency: requests at a time.
    """

    backend: str
    model_path: str
    draft_path: str | None = None
    num_steps: int = 3
    topk: int = 1
    num_draft_tokens: int = 4
    tp_size: int = 1
    dtype: str = "auto"
    mem_frac: float | None = None
    max_length: int = 2048
    concurrency: int = 16
    port: int | None = None
    engine_python: str | None = None
    engine_args: tuple[str, ...] = ()
    engine_devices: str | None = None
    log_dir: Path | None = None
    startup_minutes: float = 20.0
    trust_remote_code: bool = False

    @property
    def speculative(self) -> bool:
        return self.draft_path is not None and self.num_steps > 0


@dataclass(frozen=True)
class Acceptance:
    """Counts over all requests: verifications (forward passes of the target that checked a draft) and drafted tokens
    that were accepted. `length` = 1 + accepted / verifications, the tokens gained by a verification."""

    num_verifications: int = 0
    num_accepted: int = 0

    @property
    def length(self) -> float:
        return 1.0 + self.num_accepted / self.num_verifications if self.num_verifications else 1.0

    def __sub__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.num_verifications - other.num_verifications, self.num_accepted - other.num_accepted)

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(self.num_verifications + other.num_verifications, self.num_accepted + other.num_accepted)


@dataclass(frozen=True)
class GenerationRun:
    """Answers as token ids, in the order of the prompts, and the seconds it took from first to last."""

    outputs: list[list[int]]
    seconds: float

    @property
    def num_tokens(self) -> int:
        return sum(len(output) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


class ServingSession:
    """A server of ours for as long as the object lives; use as a context manager or call `close`.

    Raises ConfigError for options the engine cannot serve and EngineError if it does not start.
    """

    def __init__(self, options: ServingOptions) -> None:
        if options.backend not in BACKENDS:
            raise ConfigError(f"backend '{options.backend}': cannot serve{suggest(options.backend, BACKENDS)}")
        self.options = options
        self._backend = BACKENDS[options.backend]
        interpreter = find_interpreter(options.backend, options.engine_python)
        gpu = has_gpu(options.engine_devices)
        port = options.port or free_port()
        command = self._backend.command(options, interpreter.python, port, gpu) + engine_arg_words(options.engine_args)
        collect_leftovers(SHARED_MEMORY)
        self._run_dir = RunDirectory(SHARED_MEMORY)
        log_dir = options.log_dir or Path(tempfile.mkdtemp(prefix=f"specforge-{options.backend}-"))
        what = f"{options.num_steps} steps, top {options.topk}" if options.speculative else "plain decoding"
        env = self._backend.env(options, gpu)
        if options.engine_devices is not None and gpu:
            env["CUDA_VISIBLE_DEVICES"] = options.engine_devices
        self._server = LaunchedServer(
            ServerSpec(
                name=f"{options.backend} {interpreter.version} ({what})",
                command=command,
                env=env,
                url=f"http://127.0.0.1:{port}",
                health_path="/health",
                log_path=log_dir / f"{options.backend}-serving.log",
                run_dir=self._run_dir.path,
                startup_seconds=60 * options.startup_minutes,
            )
        )
        try:
            self._server.start()
            self._http = HttpLoop(options.concurrency + 1)
        except BaseException:
            self._server.stop()
            self._run_dir.close()
            raise
        self._seen = self._start = Acceptance()
        try:
            # The first speculative step compiles for many seconds; it belongs to the start, not to a measurement.
            self._http.run(self._generate_all([[1, 2, 3, 4]], 8, 0.0, True, None))
            self.reset_acceptance()
        except (ServerGone, HttpStatus, BadReply) as error:
            self.close()
            raise EngineError(f"{self._server.spec.name} fails at its first prompt: {error}; log: {log_dir}") from None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`; OpenAI-compatible below `/v1`."""
        return self._server.spec.url

    @property
    def log_path(self) -> Path:
        return self._server.spec.log_path

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        temperature: float = 0.0,
        ignore_eos: bool = False,
    ) -> GenerationRun:
        """Answer token-id prompts, at most `options.concurrency` at a time. Raises EngineError."""
        start = time.perf_counter()
        with progress(len(prompts), f"generating with {self.options.backend}", unit="prompt") as bar:
            work = self._generate_all(prompts, max_tokens, temperature, ignore_eos, bar)
            try:
                outputs = self._http.run(work)
            except (ServerGone, HttpStatus, BadReply) as error:
                raise EngineError(f"{self._server.spec.name}: {error}; log: {self.log_path}") from None
        return GenerationRun(outputs, time.perf_counter() - start)

    def acceptance(self) -> Acceptance:
        """What the server counted since the start or the last `reset_acceptance`."""
        return self._seen + self._backend_totals() - self._start

    def reset_acceptance(self) -> None:
        """Start counting anew, e.g. after a warm-up."""
        self._seen = Acceptance()
        self._start = self._backend_totals()

    def close(self) -> None:
        """Stop the server; may be called twice."""
        self._http.close()
        self._server.stop()
        self._run_dir.close()

    def __enter__(self) -> ServingSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _generate_all(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, ignore_eos: bool, bar: Any | None
    ) -> list[list[int]]:
        slots = asyncio.Semaphore(self.options.concurrency)

        async def one(prompt: Sequence[int]) -> list[int]:
            async with slots:
                path, body = self._backend.request(list(prompt), max_tokens, temperature, ignore_eos)
                reply = await self._http.post_json(self.url + path, body)
            token_ids, counted = self._backend.reply(reply)
            self._seen += counted
            if bar is not None:
                bar.update(1)
            return token_ids

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

    def _backend_totals(self) -> Acceptance:
        if not (self.options.speculative and self._backend.metrics_path):
            return Acceptance()
        return parse_vllm_metrics(self._http.run(self._http.get_text(self.url + self._backend.metrics_path)))


@dataclass(frozen=True)
class ServingBackend:
    """How one engine is started and asked. `reply` returns the answer and what it says about acceptance; an engine
    that counts for the whole server only has a `metrics_path` instead."""

    command: Callable[[ServingOptions, str, int, bool], list[str]]
    env: Callable[[ServingOptions, bool], dict[str, str]]
    request: Callable[[list[int], int, float, bool], tuple[str, dict[str, Any]]]
    reply: Callable[[dict[str, Any]], tuple[list[int], Acceptance]]
    metrics_path: str | None = None


def draft_algorithm(draft_path: str) -> tuple[str, str]:
    """What (SGLang, vLLM) call the algorithm of an exported draft; raises ConfigError."""
    path = Path(draft_path) / "config.json"
    try:
        architectures = json.loads(path.read_text())["architectures"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not an exported draft ({type(error).__name__})") from None
    if architectures[0] not in ALGORITHMS:
        raise ConfigError(f"{path}: architectures {architectures}{suggest(architectures[0], ALGORITHMS)}")
    return ALGORITHMS[architectures[0]]


def _sglang_command(options: ServingOptions, python: str, port: int, gpu: bool) -> list[str]:
    words = [python, "-m", "sglang.launch_server", "--model-path", options.model_path, "--host", "127.0.0.1"]
    words += ["--port", str(port), "--tp-size", str(options.tp_size), "--dtype", options.dtype]
    words += ["--context-length", str(options.max_length), "--max-running-requests", str(options.concurrency)]
    words.append("--skip-server-warmup")
    mem_frac = options.mem_frac
    if not gpu:
        mem_frac = mem_frac or 0.1
        tokens = max(2, options.concurrency) * (options.max_length + options.num_draft_tokens * options.topk)
        words += [*sglang.CPU_FLAGS, "--attention-backend", "torch_native"]
        words += ["--max-total-tokens", str(min(tokens, 4 * sglang.MOST_POOLED_TOKENS_CPU))]
    if options.speculative:
        words += ["--speculative-algorithm", draft_algorithm(str(options.draft_path))[0]]
        words += ["--speculative-draft-model-path", str(Path(str(options.draft_path)).resolve())]
        words += ["--speculative-num-steps", str(options.num_steps), "--speculative-eagle-topk", str(options.topk)]
        words += ["--speculative-num-draft-tokens", str(options.num_draft_tokens)]
        if not gpu:  # the only CPU attention that knows draft trees
            words += ["--prefill-attention-backend", "intel_amx", "--decode-attention-backend", "intel_amx"]
    if mem_frac is not None:
        words += ["--mem-fraction-static", str(mem_frac)]
    return words + (["--trust-remote-code"] if options.trust_remote_code else [])


def _sglang_env(options: ServingOptions, gpu: bool) -> dict[str, str]:
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    return env if gpu else env | sglang.cpu_env(options.tp_size)


def _sglang_request(
    token_ids: list[int], max_tokens: int, temperature: float, ignore_eos: bool
) -> tuple[str, dict[str, Any]]:
    params = {"max_new_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
    return "/generate", {"input_ids": token_ids, "sampling_params": params}


def _sglang_reply(reply: dict[str, Any]) -> tuple[list[int], Acceptance]:
    facts = reply["meta_info"]
    counted = Acceptance(int(facts.get("spec_verify_ct", 0)), int(facts.get("spec_num_correct_drafts", 0)))
    return list(reply["output_ids"]), counted


def _vllm_command(options: ServingOptions, python: str, port: int, gpu: bool) -> list[str]:
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model_path]
    words += ["--host", "127.0.0.1", "--port", str(port), "--tensor-parallel-size", str(options.tp_size)]
    words += ["--dtype", options.dtype, "--max-model-len", str(options.max_length)]
    words += ["--max-num-seqs", str(options.concurrency)]
    if options.speculative:
        if options.topk != 1 or options.num_draft_tokens != options.num_steps + 1:
            raise ConfigError(
                f"vllm drafts chains only: topk {options.topk} and {options.num_draft_tokens} draft tokens asked for,"
                f" expected topk 1 and num_steps + 1 = {options.num_steps + 1}"
            )
        draft = {
            "method": draft_algorithm(str(options.draft_path))[1],
            "model": str(Path(str(options.draft_path)).resolve()),
            "num_speculative_tokens": options.num_steps,
        }
        words += ["--speculative-config", json.dumps(draft)]
    if not gpu:
        words.append("--enforce-eager")
    elif options.mem_frac is not None:
        words += ["--gpu-memory-utilization", str(options.mem_frac)]
    return words + (["--trust-remote-code"] if options.trust_remote_code else [])


def _vllm_env(options: ServingOptions, gpu: bool) -> dict[str, str]:
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    return env if gpu else env | vllm.cpu_env(options.tp_size)


def _vllm_request(
    token_ids: list[int], max_tokens: int, temperature: float, ignore_eos: bool
) -> tuple[str, dict[str, Any]]:
    body = {"prompt": token_ids, "max_tokens": max_tokens, "temperature": temperature, "ignore_eos": ignore_eos}
    return "/v1/completions", {**body, "return_token_ids": True}


def _vllm_reply(reply: dict[str, Any]) -> tuple[list[int], Acceptance]:
    return list(reply["choices"][0]["token_ids"]), Acceptance()


_VLLM_COUNTER = re.compile(r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{[^}]*\})?\s+([0-9.e+]+)", re.M)


def parse_vllm_metrics(text: str) -> Acceptance:
    """Sum vLLM's Prometheus counters over its engines."""
    totals = {"drafts": 0.0, "accepted_tokens": 0.0}
    for name, value in _VLLM_COUNTER.findall(text):
        totals[name] += float(value)
    return Acceptance(int(totals["drafts"]), int(totals["accepted_tokens"]))


BACKENDS: dict[str, ServingBackend] = {
    "sglang": ServingBackend(_sglang_command, _sglang_env, _sglang_request, _sglang_reply),
    "vllm": ServingBackend(_vllm_command, _vllm_env, _vllm_request, _vllm_reply, metrics_path="/metrics"),
}
