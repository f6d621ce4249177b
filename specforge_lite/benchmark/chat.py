"""From a prompt's turns to token ids, with the target's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specforge_lite.benchmark.prompts import Prompt
from specforge_lite.core.errors import ConfigError
from specforge_lite.core.hub import load_tokenizer


class Chat:
    """Renders conversations. template_kwargs go to the chat template (e.g. {"enable_thinking": false}).

    system_prompt is added to conversations that have none; raw: no template, texts are joined as they are.

    Raises ConfigError for a tokenizer without a template, unless raw.
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        raw: bool = False,
    ) -> None:
        if not raw and not getattr(tokenizer, "chat_template", None):
            raise ConfigError("the target's tokenizer has no chat template; --raw-prompts sends prompts as they are")
        self.tokenizer, self.raw = tokenizer, raw
        self.template_kwargs, self.system_prompt = dict(template_kwargs or {}), system_prompt

    @classmethod
    def of_model(
        cls,
        model_path: str,
        template_kwargs: dict[str, Any] | None,
        system_prompt: str | None,
        raw: bool,
        trust_remote_code: bool,
    ) -> Chat:
        """With the tokenizer of a model; raises ConfigError if it cannot be loaded."""
        tokenizer = load_tokenizer(model_path, trust_remote_code, "model_path")
        return cls(tokenizer, template_kwargs, system_prompt, raw)

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation that ends with the user, ready for the assistant's answer."""
        messages = list(messages)
        if self.system_prompt is not None and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self.raw:
            return list(self.tokenizer("".join(message["content"] for message in messages))["input_ids"])
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **self.template_kwargs
        )
        return list(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer as it goes into the next turn's conversation."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def longest(self, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
        """Tokens that the longest conversation may reach, answers included."""
        lengths = []
        for prompt in prompts:
            first = self.encode([*prompt.context, {"role": "user", "content": prompt.turns[0]}])
            later = sum(len(self.encode([{"role": "user", "content": turn}])) for turn in prompt.turns[1:])
            lengths.append(len(first) + later + len(prompt.turns) * max_new_tokens)
        return max(lengths)
