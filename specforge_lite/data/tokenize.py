"""Conversation or FIM row -> TokenizedSample: template, one tokenization, loss mask, length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specforge_lite.core.errors import DataError
from specforge_lite.core.sections import DataSection
from specforge_lite.data.conversations import RowRejected, to_conversation
from specforge_lite.data.encoding import TextEncoder, TokenizerSpec
from specforge_lite.data.fim import FimTokenizer, is_fim_row, to_fim_row
from specforge_lite.data.templates import ChatTemplate
from specforge_lite.data.templates.auto import choose_template, own_template
from specforge_lite.types import Conversation, TokenizedSample

# Raised when the same text and template would give other ids or another mask than before: old caches are then unused.
TOKENIZATION_VERSION = 2


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
        return cls(
            chat_template=section.chat_template,
            max_length=section.max_length,
            train_only_last_turn=section.train_only_last_turn,
            system_prompt=section.system_prompt,
            fim_order=section.fim_order,
        )


@dataclass(frozen=True)
class TokenRow:
    """Ids [L] int32 and loss mask [L] bool of one sample.

    num_cut: tokens beyond the maximal length, left out; span_cut_off: every trained one was among them.
    lost_reasoning: the template has no place for the reasoning of the last answer.
    """

    sample_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    num_cut: int = 0
    span_cut_off: bool = False
    lost_reasoning: bool = False

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
        self._tool_template = for_tools or self.template
        self.encoder = TextEncoder(spec, {*self.template.control_tokens, *self._tool_template.control_tokens})

    def __call__(self, conversation: Conversation) -> TokenRow:
        """Raises DataError when the template has no form for what the conversation holds."""
        messages: Sequence[dict[str, Any]] = conversation.messages
        tools: Sequence[dict[str, Any]] = conversation.tools or ()
        if self.options.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.options.system_prompt}, *messages]
        quoted = self.encoder.has_control_token(messages) or self.encoder.has_control_token(tools)
        if quoted:
            messages, tools = self.encoder.quote(messages), self.encoder.quote(tools)
        template = self._tool_template if tools else self.template
        rendering = template.render(messages, tools, self.options.train_only_last_turn)
        ids, mask = self.encoder.encode_quoted(rendering) if quoted else self.encoder.encode(rendering)
        limit = self.options.max_length
        cut_off = bool(mask.any()) and not bool(mask[:limit].any())
        num_cut = max(0, len(ids) - limit)
        return TokenRow(conversation.id, ids[:limit], mask[:limit], num_cut, cut_off, rendering.lost_reasoning)


class RowTokenizer:
    """Parsed row -> TokenRow, for files of conversations (`data_format` chat) or of FIM rows (fim).

    Calling it raises RowRejected for a row that is neither read nor mended, NoForm for one the template cannot render.
    """

    def __init__(self, spec: TokenizerSpec, options: TokenizeOptions, data_format: str) -> None:
        self.data_format = data_format
        self._fim = FimTokenizer(spec, options.fim_order, options.max_length) if data_format == "fim" else None
        self._chat = ConversationTokenizer(spec, options) if data_format == "chat" else None

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template; None for FIM rows."""
        return self._chat.template if self._chat is not None else None

    def key(self) -> dict[str, Any]:
        """What the rows are rendered with, as part of a cache's key."""
        if self._fim is not None:
            return {"template": self._fim.name, "template_content": self._fim.layout}
        assert self._chat is not None
        content = [self._chat.template.fingerprint, self._chat._tool_template.fingerprint]
        return {"template": self._chat.template.name, "template_content": content}

    def __call__(self, value: Any) -> TokenRow:
        if is_fim_row(value) != (self._fim is not None):
            found, expected = ("fill-in-the-middle", "conversations") if self._fim is None else ("chat", "FIM rows")
            raise RowRejected("mixed-formats", f"a {found} row in a file of {expected}; expected one format per file")
        if self._fim is not None:
            row = to_fim_row(value)
            ids, mask, num_cut = self._fim(row)
            return TokenRow(row.id, ids, mask, num_cut)
        assert self._chat is not None
        conversation = to_conversation(value)
        try:
            return self._chat(conversation)
        except DataError as error:
            raise NoForm(conversation.id, str(error)) from None


class NoForm(DataError):
    """The template has no form for what a conversation holds (a role, tool calls)."""

    def __init__(self, sample_id: str, reason: str) -> None:
        super().__init__(reason)
        self.sample_id = sample_id


def tokenize_conversation(
    conversation: Conversation,
    tokenizer: Any,
    template: str = "auto",
    max_length: int = 2048,
    train_only_last_turn: bool = False,
    system_prompt: str | None = None,
) -> TokenizedSample:
    """Tokenize one conversation with a transformers tokenizer. For many, make one `ConversationTokenizer`."""
    options = TokenizeOptions(template, max_length, train_only_last_turn, system_prompt)
    return ConversationTokenizer(TokenizerSpec.from_tokenizer(tokenizer), options)(conversation).to_sample()
