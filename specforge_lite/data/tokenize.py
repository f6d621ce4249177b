"""Conversation -> TokenizedSample: template, one tokenization, loss mask, length."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from specforge_lite.core import log
from specforge_lite.core.errors import DataError
from specforge_lite.core.sections import DataSection
from specforge_lite.data.conversations import RowRejected, is_fim_row, to_conversation
from specforge_lite.data.encoding import TextEncoder, TokenizerSpec
from specforge_lite.data.templates.rendering import ChatTemplate, choose_template, own_template
from specforge_lite.types import Conversation, TokenizedSample

# Raised when the same text and template would give other ids or another mask than before: old caches are then unused.
TOKENIZATION_VERSION = 2
ONE_FORMAT = "expected one format per file"


@dataclass(frozen=True)
class TokenizeOptions:
    """The options that change ids or masks; part of a cache's key."""

    chat_template: str = "auto"
    max_length: int = 2048
    train_only_last_turn: bool = False
    system_prompt: str | None = None
    fim_order: str = "psm"

    @classmethod
    def from_section(cls, section: DataSection) -> TokenizeOptions:
        return cls(**{option.name: getattr(section, option.name) for option in fields(cls)})


@dataclass(frozen=True)
class TokenRow:
    """Ids [L] int32 and loss mask [L] bool of one sample.

    num_cut: tokens beyond the maximal length, left out; span_cut_off: every trained one was among them.
    lost_reasoning: the template has no place for the reasoning of the last answer. refused: why the template has no
    form for what the conversation holds (a role, tool calls); there are no tokens then.
    """

    sample_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_cut: int = 0
    span_cut_off: bool = False
    lost_reasoning: bool = False
    refused: str = ""

    def to_sample(self) -> TokenizedSample:
        import torch

        return TokenizedSample(
            self.sample_id, torch.from_numpy(self.input_ids.astype(np.int64)), torch.from_numpy(self.loss_mask.copy())
        )


class ConversationTokenizer:
    """Tokenizes conversations of one tokenizer with one template; made from a `TokenizerSpec`, so any process can
    have its own. Raises DataError if the template is unknown or cannot be recognised."""

    def __init__(self, spec: TokenizerSpec, options: TokenizeOptions) -> None:
        self.options = options
        self.template: ChatTemplate = choose_template(options.chat_template, spec)
        for_tools = own_template(spec, for_tools=True) if self.template.is_own else None
        self.tool_template = for_tools or self.template
        self.encoder = TextEncoder(spec, {*self.template.control_tokens, *self.tool_template.control_tokens})

    def __call__(self, conversation: Conversation) -> TokenRow:
        """Raises DataError when the template has no form for what the conversation holds."""
        messages, tools = conversation.messages, conversation.tools or []
        if self.options.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.options.system_prompt}, *messages]
        quoted = self.encoder.quote([messages, tools])
        encode = self.encoder.encode if quoted == [messages, tools] else self.encoder.encode_quoted
        template = self.tool_template if tools else self.template
        rendering = template.render(quoted[0], quoted[1], self.options.train_only_last_turn)
        ids, mask = encode(rendering)
        limit = self.options.max_length
        cut_off = bool(mask.any()) and not bool(mask[:limit].any())
        num_cut = max(0, len(ids) - limit)
        return TokenRow(conversation.id, ids[:limit], mask[:limit], num_cut, cut_off, rendering.lost_reasoning)


class RowTokenizer:
    """Parsed row -> TokenRow, for files of conversations; `fim.FimRowTokenizer` is that of the others.

    Calling it raises RowRejected for a row that is neither read nor mended. Other processes get a copy of their own.
    """

    def __init__(self, spec: TokenizerSpec, options: TokenizeOptions) -> None:
        self._arguments = (spec, options)
        self.chat = ConversationTokenizer(spec, options)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def key(self) -> dict[str, Any]:
        """All that decides ids and masks besides the rows, as part of a cache's key."""
        spec, options = self._arguments
        key = {"version": TOKENIZATION_VERSION, "format": "chat", "tokenizer": spec.fingerprint}
        content = [self.chat.template.fingerprint, self.chat.tool_template.fingerprint]
        key |= {"template": self.chat.template.name, "template_content": content, "max_length": options.max_length}
        return {**key, "train_only_last_turn": options.train_only_last_turn, "system_prompt": options.system_prompt}

    def __call__(self, value: Any) -> TokenRow:
        if is_fim_row(value):
            raise RowRejected("mixed-formats", f"a fill-in-the-middle row in a file of conversations; {ONE_FORMAT}")
        conversation = to_conversation(value)
        try:
            return self.chat(conversation)
        except DataError as error:
            nothing = np.zeros(0, dtype=np.int32)
            return TokenRow(conversation.id, nothing, nothing.astype(bool), refused=str(error))


def row_tokenizer(tokenizer: Any, section: DataSection, data_format: str) -> RowTokenizer:
    """What tokenizes the rows of a run; a template that has its doubts says so on the main rank."""
    spec = TokenizerSpec.from_tokenizer(tokenizer)
    options = TokenizeOptions.from_section(section)
    if data_format == "fim":
        from specforge_lite.data.fim import FimRowTokenizer

        return FimRowTokenizer(spec, options)
    rows = RowTokenizer(spec, options)
    if not rows.chat.template.is_own and log.is_main_rank():
        from specforge_lite.data.templates.families import template_warning

        if warning := template_warning(rows.chat.template, spec):
            log.warn(warning)
    return rows
