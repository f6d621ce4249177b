"""Which target families each serving engine captures right; docs/engines.md shows the same table.

What an engine does with a family stands in the engine's own file (`Engine.support`, by the names used here).
"""

from __future__ import annotations

from specforge_lite.capture.base import TargetInfo
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_config
from specforge_lite.core.log import warn
from specforge_lite.core.sections import TargetSection
from specforge_lite.serving.engine import Engine, Support, engine_arg
from specforge_lite.serving.environment import SERVING_ENGINES, Interpreter, ask_registry

# Family -> the names that transformers gives its classes (`architectures` in config.json).
FAMILIES: dict[str, tuple[str, ...]] = {
    "Llama 2, 3": ("LlamaForCausalLM",),
    "Llama 4": ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    "Mistral, Ministral": ("MistralForCausalLM", "Ministral3ForCausalLM"),
    "Mistral 3 (vision)": ("Mistral3ForConditionalGeneration",),
    "Mixtral": ("MixtralForCausalLM",),
    "Qwen 2, 2.5": ("Qwen2ForCausalLM",),
    "Qwen 3": ("Qwen3ForCausalLM",),
    "Qwen 2 MoE": ("Qwen2MoeForCausalLM",),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM",),
    "Qwen 3 Next": ("Qwen3NextForCausalLM",),
    "Qwen 2.5 VL, 3 VL": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
    ),
    "Phi 3, 4": ("Phi3ForCausalLM",),
    "Phi 2": ("PhiForCausalLM",),
    "Phi MoE": ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    "Gemma 2": ("Gemma2ForCausalLM",),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    "Gemma 4": ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    "gpt-oss": ("GptOssForCausalLM",),
    "DeepSeek V2, V3, R1": ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"),
    "Kimi K2.5": ("KimiK25ForConditionalGeneration",),
    "GLM 4": ("GlmForCausalLM", "Glm4ForCausalLM"),
    "GLM 4 MoE": ("Glm4MoeForCausalLM",),
    "GLM 4 MoE Lite": ("Glm4MoeLiteForCausalLM",),
    "GLM MoE DSA": ("GlmMoeDsaForCausalLM",),
    "MiniCPM 4": ("MiniCPMForCausalLM",),
    "MiniMax M2": ("MiniMaxM2ForCausalLM",),
    "Cohere": ("CohereForCausalLM", "Cohere2ForCausalLM"),
    "Granite": ("GraniteForCausalLM",),
    "OLMo 1, 2, 3": ("OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    "Nemotron H": ("NemotronHForCausalLM",),
}  # fmt: skip


def support_of(engine: Engine, architecture: str) -> Support | None:
    """What is known of an architecture; None for one that is not in the table."""
    family = next((name for name, members in FAMILIES.items() if architecture in members), None)
    return None if family is None else engine.support[family]


def check_target(engine: Engine, target: TargetSection, info: TargetInfo, interpreter: Interpreter | None) -> None:
    """Raise ConfigError if the engine would capture other states than the target's, or none.

    interpreter: where a server is about to be launched; its registry of models is asked before any weight is loaded.
    """
    config = load_config(target.target_model_path, target.trust_remote_code)
    architecture = str((getattr(config, "architectures", None) or ["?"])[0])
    text = config.get_text_config()
    dtype: str = target.target_dtype
    if dtype == "auto":
        dtype = str(getattr(config, "dtype", None) or getattr(text, "dtype", None)).removeprefix("torch.")
    support = support_of(engine, architecture)
    problem = support.note if support is not None and support.status == "refused" else None
    problem = problem or engine.target_problem(support, text, info, dtype)
    for flag in ("pipeline-parallel-size", "pp-size", "pp"):
        if problem is None and (size := engine_arg(target.engine_arg, flag)) not in (None, "1"):
            problem = f"--engine-arg {flag}={size}: hidden states are those of one pipeline rank only"
    if interpreter is not None and (support is None or not interpreter.version.startswith(engine.versions[0])):
        problem = problem or _registry_problem(interpreter, architecture)
    if problem is not None:
        others = {
            other.name: support_of(other, architecture) for other in SERVING_ENGINES.values() if other is not engine
        }
        able = [name for name, found in others.items() if found is not None and found.status != "refused"]
        place = f"target_backend {engine.name}: {architecture} ({target.target_model_path})"
        raise ConfigError(f"{place}: {problem}; use --target-backend {' or '.join([*able[:1], 'hf'])}")


def _registry_problem(interpreter: Interpreter, architecture: str) -> str | None:
    answer, reason = ask_registry(interpreter, architecture)
    name = f"{interpreter.engine} {interpreter.version}"
    if answer is None:
        warn(f"{name} could not be asked whether it serves {architecture}: {reason}")
    elif not answer["known"]:
        warn(f"{name} has no model {architecture} of its own; it may run it through transformers, or refuse it")
    elif not answer["eagle3"]:
        return f"{name} hands out no aux hidden states for it"
    return None
