"""What this project must know about a serving engine; sglang.py and vllm.py hold all of it, one file per engine.

Layer ids are ours (0-based layer OUTPUTS) everywhere but inside those two files.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar, Literal

from packaging.specifiers import SpecifierSet

from specforge_lite.capture.base import TargetInfo
from specforge_lite.capture.remote import CaptureDialect
from specforge_lite.core.errors import ConfigError, EngineError, suggest
from specforge_lite.model.config_json import block_kind_of


@dataclass(frozen=True)
class ServingOptions:
    """What to serve. num_steps 0 or no draft_path: plain decoding.

    num_steps: tokens a chain drafts; topk: branches per step; num_draft_tokens: nodes verified at once, the last
    accepted token included (SGLang's words). max_length: tokens of prompt plus answer. concurrency: requests at a time.
    temperature: of the requests to come; above 0 draft tokens are drawn from the draft's distribution where the engine
    can (`sampling_problem`), else, and by default in both engines, they are its most probable ones; answers have the
    target's distribution either way. engine_devices: the server's CUDA_VISIBLE_DEVICES, None: ours.
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
    temperature: float = 0.0
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


@dataclass(frozen=True, kw_only=True)
class Launch(ServingOptions):
    """Options of a server that is about to be started: by which interpreter, where it listens (`port` is a number by
    now), and whether it has a GPU."""

    python: str
    host: str
    gpu: bool


@dataclass(frozen=True)
class Acceptance:
    """num_passes: verifications, forward passes of the target that checked a draft. accepted_at[k]: those that accepted
    at least k + 1 drafted tokens. `length` = 1 + accepted / passes, the tokens gained by a pass."""

    num_passes: int = 0
    accepted_at: tuple[int, ...] = ()

    @property
    def length(self) -> float:
        return 1.0 + sum(self.accepted_at) / self.num_passes if self.num_passes else 1.0

    def __add__(self, other: Acceptance) -> Acceptance:
        pairs = zip_longest(self.accepted_at, other.accepted_at, fillvalue=0)
        return Acceptance(self.num_passes + other.num_passes, tuple(a + b for a, b in pairs))

    def __sub__(self, other: Acceptance) -> Acceptance:
        return self + Acceptance(-other.num_passes, tuple(-n for n in other.accepted_at))


@dataclass(frozen=True)
class Generation:
    """One answer. passes: verification passes (None: not known for this request alone); accepted_at[k]: passes that
    accepted drafted token k. Seconds count from sending the request; num_first_tokens came together with the first (a
    slow client gets several at once)."""

    token_ids: tuple[int, ...]
    passes: int | None
    accepted_at: tuple[int, ...]
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str = ""
    num_first_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def latency_per_token(self) -> float | None:
        """Seconds per token after the first; None for an answer that came all at once."""
        if self.num_tokens <= self.num_first_tokens:
            return None
        return (self.seconds - self.first_token_seconds) / (self.num_tokens - self.num_first_tokens)


@dataclass(frozen=True)
class Support:
    """Whether an engine captures the right states of a target family. `run`: compared with transformers by a live
    test; `read`: in the engine's model file; `refused`: it does not. note: why, or under what condition."""

    status: Literal["run", "read", "refused"]
    note: str = ""


def by_family(groups: dict[Support, tuple[str, ...]]) -> dict[str, Support]:
    """`Engine.support` from the families of each kind of support."""
    return {family: support for support, families in groups.items() for family in families}


class Engine(CaptureDialect, ABC):
    """One serving engine: a `CaptureDialect`, and how its server is started, asked and measured.

    distributions: names of its packages. versions: (first supported, first unsupported); what is used of the engine was
    read in the first. identify_path: a GET that only this engine answers. registry_query: Python code that prints, in
    the engine's environment, `{"known": bool, "eagle3": bool}` for the architecture in argv[1].
    support: target family (see families.py) -> `Support`. draft_algorithms: class name in a draft's config -> the
    engine's word. cumulative_stream: a chunk of a stream repeats the answer so far. metrics_path: Prometheus page of an
    engine that counts acceptance over the whole server only. greedy_on_cpu: with a draft it answers greedily on a CPU,
    whatever the temperature.
    """

    name: str
    distributions: ClassVar[tuple[str, ...]]
    versions: ClassVar[tuple[str, str]]
    identify_path: ClassVar[str]
    registry_query: ClassVar[str]
    support: ClassVar[dict[str, Support]]
    draft_algorithms: ClassVar[dict[str, str]]
    cumulative_stream: ClassVar[bool] = False
    metrics_path: ClassVar[str | None] = None
    greedy_on_cpu: ClassVar[bool] = False
    health_path: str = "/health"

    # ------------------------------------------------------------------------------------------------------- starting
    @abstractmethod
    def capture_command(self, launch: Launch, info: TargetInfo) -> list[str]:
        """Command line of a server that captures `info.aux_layer_ids` and the last hidden state."""

    @abstractmethod
    def serving_command(self, launch: Launch) -> list[str]:
        """Command line of a server that decodes, with a draft if `launch` names one. Raises ConfigError."""

    @abstractmethod
    def speculative_words(self, options: ServingOptions, draft: dict[str, Any], gpu: bool = True) -> list[str]:
        """Flags of the draft at `options.draft_path`. draft: its config.json. Raises ConfigError."""

    @abstractmethod
    def sampling_problem(self, draft: dict[str, Any], topk: int, gpu: bool) -> str | None:
        """Why the tokens of a draft with this config.json are not drawn from its distribution; None where they are."""

    def draws(self, options: ServingOptions, draft: dict[str, Any], gpu: bool) -> bool:
        """Whether a server is told to draw the draft's tokens."""
        return options.temperature > 0 and self.sampling_problem(draft, options.topk, gpu) is None

    @abstractmethod
    def environment(self, launch: Launch) -> dict[str, str]:
        """Environment of the server, over ours."""

    def check_version(self, version: str) -> None:
        """Raise ConfigError for a version outside `versions`."""
        lowest, below = self.versions
        if not SpecifierSet(f">={lowest},<{below}").contains(version, prereleases=True):
            raise ConfigError(
                f"{self.name} {version}: supported are versions from {lowest} up to, not including, {below}"
            )

    @abstractmethod
    def target_problem(self, support: Support | None, text_config: Any, info: TargetInfo, dtype: str) -> str | None:
        """Why the target's states would be others than its own, in one clause; None if they are its own. support: of
        its family. dtype: what it runs in (`bfloat16`, ...), resolved."""

    def draft_algorithm(self, options: ServingOptions, draft: dict[str, Any]) -> str:
        """What the engine calls the algorithm of the draft; raises ConfigError, also for a block draft that is served
        with another number of tokens than it was trained with: the block would have other slots."""
        path, architecture = options.draft_path, draft["architectures"][0]
        if architecture not in self.draft_algorithms:
            hint = suggest(str(architecture), self.draft_algorithms)
            raise ConfigError(f"{path}: architectures ['{architecture}']{hint}")
        trained = block_length(draft)
        if trained is not None and (options.num_steps, options.topk) != (trained, 1):
            raise ConfigError(
                f"{path}: a {block_kind_of(draft)} draft of {trained} tokens a block: num_steps {options.num_steps} and"
                f" topk {options.topk} asked for, expected {trained} and 1"
            )
        return self.draft_algorithms[architecture]

    # ------------------------------------------------------------------------------------------------------- decoding
    @abstractmethod
    def generate_request(
        self, token_ids: Sequence[int], max_tokens: int, temperature: float, ignore_eos: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """Path and JSON body; `"stream": true` may be added to the body."""

    @abstractmethod
    def read_generation(self, chunks: Sequence[dict[str, Any]], speculative: bool) -> Generation:
        """The answer of a stream, or of its only reply. Raises EngineError for an error the server reports, ValueError,
        KeyError, TypeError or IndexError for anything else that is no answer."""

    def flush_request(self) -> tuple[str, str] | None:
        """(method, path) that makes the server forget prefixes it computed; None where it keeps none."""
        return None

    def read_metrics(self, text: str) -> Acceptance:
        """The page at `metrics_path` -> counts since the server's start, summed over its engines."""
        raise NotImplementedError


def read_draft_config(path: str | Path | None) -> dict[str, Any]:
    """config.json of an exported draft. Raises ConfigError."""
    file = Path(str(path)) / "config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_text())
        _ = config["architectures"][0]
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ConfigError(f"{file}: not an exported draft ({type(error).__name__})") from None
    return config


def block_length(draft: dict[str, Any]) -> int | None:
    """Tokens that a block draft drafts in a pass; None for an EAGLE draft. draft: its config.json."""
    kind = block_kind_of(draft)
    return None if kind is None else int(draft.get("block_size", 0)) - (kind == "dflash")


def refuse_reported_error(engine: str, chunk: dict[str, Any]) -> None:
    """Raise EngineError if a chunk of an answer holds the server's error."""
    if "error" in chunk:
        error = chunk["error"]
        text = error.get("message") if isinstance(error, dict) else error
        raise EngineError(f"{engine}: {' '.join(str(text or error).split())[:300]}")


def engine_arg_words(items: Sequence[str]) -> list[str]:
    """`--engine-arg key=value` as flags of the server; a key alone is a switch. They come last, so they win."""
    words: list[str] = []
    for item in items:
        key, equals, value = item.partition("=")
        if not key.strip("-"):
            raise ConfigError(f"engine_arg '{item}': expected key=value, e.g. --engine-arg max-running-requests=32")
        words.append("--" + key.lstrip("-").replace("_", "-"))
        if equals:
            words.append(value)
    return words


def engine_arg(items: Sequence[str], name: str) -> str | None:
    """The value that `--engine-arg` gives to the server's flag `name`, with dashes; "" for a switch, None if absent."""
    words = engine_arg_words(items)
    found = [place for place, word in enumerate(words) if word == f"--{name}"]
    if not found:
        return None
    rest = words[found[-1] + 1 : found[-1] + 2]
    return rest[0] if rest and not rest[0].startswith("--") else ""


def cpu_thread_binding(tp_size: int) -> tuple[int, str]:
    """(threads per rank, binding `0-1|2-3`) that spread the usable cores over tensor-parallel ranks on CPU."""
    cores = sorted(os.sched_getaffinity(0))
    if tp_size > len(cores):
        raise ConfigError(f"tp_size {tp_size}: only {len(cores)} CPU cores here, one rank needs one")
    share = len(cores) // tp_size
    threads = max(1, share // 2 if tp_size == 1 else share)
    wanted = os.environ.get("OMP_NUM_THREADS")
    threads = int(wanted) if wanted and wanted.isdigit() else threads
    groups = [cores[rank * share : rank * share + min(threads, share)] for rank in range(tp_size)]
    return threads, "|".join(",".join(str(core) for core in group) for group in groups)


def without_compiler() -> dict[str, str]:
    """For a server on CPU: torch.compile off, unless the user has it on. It needs a C++ compiler, and builds the small
    functions around drafting for longer than they take."""
    return {"TORCHDYNAMO_DISABLE": os.environ.get("TORCHDYNAMO_DISABLE", "1")}
