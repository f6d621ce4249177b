"""Prompts to answer: the one reader of prompt files, and the rendering with the target's own chat template.

A row is a conversation of any form that training data may have, or `turns` (MT-bench); where it ends with an answer,
that answer is what is asked for. Rows that cannot be read, or that the template refuses, are a DataError that names
the first of them and counts them, before anything is decoded; prompts too long for the target are left out, named and
counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from specforge_lite.core.errors import ConfigError, DataError, first_line
from specforge_lite.core.hub import load_config, load_tokenizer
from specforge_lite.core.log import warn
from specforge_lite.data.conversations import RowRejected, to_conversation
from specforge_lite.data.reading import BadRow
from specforge_lite.data.sources import Source

Message = dict[str, Any]
NUM_NAMED = 5  # of the prompts that are left out
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer. turns: texts of the user, each asked after the answer to the one before; context:
    messages before the first of them (all of them, where a tool result is to be answered). place: where the row
    stands, for messages."""

    id: str
    category: str
    turns: tuple[str, ...]
    context: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    place: str = field(default="", compare=False)

    @property
    def steps(self) -> list[list[Message]]:
        """The messages that are added before each answer."""
        first, *later = [[{"role": "user", "content": turn}] for turn in self.turns] or [[]]
        return [[*self.context, *first], *later]


def read_turns(row: dict[str, Any], place: str) -> Prompt:
    """MT-bench as FastChat (`turns`) or the hub (`prompt`, a list) has it. Raises DataError."""
    turns = row.get("turns", row.get("prompt"))
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise DataError(f"{place}: expected 'turns', a list of texts")
    number = row.get("question_id", row.get("prompt_id", place))
    return Prompt(str(number), category_of(row, "all"), tuple(turns), place=place)


def read_prompt(row: dict[str, Any], place: str) -> Prompt:
    """A row of any form; the last answer is left out. Raises DataError, RowRejected."""
    if isinstance(row.get("turns"), list):
        return read_turns(row, place)
    conversation = to_conversation(row)
    messages = list(conversation.messages)
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    turns = (str(messages.pop()["content"]),) if messages and messages[-1]["role"] == "user" else ()
    tools = tuple(conversation.tools or ())
    return Prompt(conversation.id, category_of(row, "all"), turns, tuple(messages), tools, place)


def category_of(row: dict[str, Any], default: str) -> str:
    """`category` or `subject` of a row."""
    value = row.get("category", row.get("subject"))
    return value if isinstance(value, str) and value else default


def read_prompts(source: Source | Path, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of a file, directory or data set. Raises DataError (see the top of this file)."""
    return read_rows(source, limit, read_prompt)


def read_rows(source: Source | Path, limit: int | None, read: Callable[[dict[str, Any], str], RowT]) -> list[RowT]:
    """`read(row, place)` of the first `limit` rows, at least one. Raises DataError: the first one of `read`, and how
    many there are."""
    source = source if isinstance(source, Source) else Source(source.name, path=source)
    rows: list[RowT] = []
    errors: list[str] = []
    for place, row in islice(source.rows(), limit):
        try:
            if isinstance(row, BadRow):
                raise RowRejected(row.reason, f"{row.reason}: {row.detail}")
            if not isinstance(row.value, dict):
                raise RowRejected("not-an-object", f"expected an object, found {type(row.value).__name__}")
            rows.append(read(row.value, place))
        except RowRejected as error:
            errors.append(f"{place}: {error}")
        except DataError as error:
            errors.append(str(error))
    _raise_counted(errors, len(rows) + len(errors))
    if not rows:
        raise DataError(f"{source}: no row in it")
    return rows


def _raise_counted(errors: Sequence[str], num_rows: int) -> None:
    if errors:
        more = f" ({len(errors)} of {num_rows} rows cannot be used)" if len(errors) > 1 else ""
        raise DataError(f"{errors[0]}{more}")


class ChatEncoder:
    """Renders conversations. template_kwargs go to the chat template (e.g. {"enable_thinking": false}); system_prompt
    is added to conversations that have none; raw: no template, texts are joined as they are.

    Raises ConfigError for a tokenizer without a template, unless raw (raw_flag names the flag for that, if any).
    """

    def __init__(
        self,
        tokenizer: Any,
        template_kwargs: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        raw: bool = False,
        raw_flag: str = "",
    ) -> None:
        if not raw and not getattr(tokenizer, "chat_template", None):
            remedy = f"; {raw_flag} sends prompts as they are" if raw_flag else "; prompts of text need one"
            raise ConfigError(f"the target's tokenizer has no chat template{remedy}")
        self.tokenizer, self.raw = tokenizer, raw
        self.template_kwargs, self.system_prompt = dict(template_kwargs or {}), system_prompt

    @classmethod
    def of_model(cls, model_path: str, trust_remote_code: bool = False, **options: Any) -> ChatEncoder:
        """With the tokenizer of a model; raises ConfigError if it cannot be loaded."""
        return cls(load_tokenizer(model_path, trust_remote_code), **options)

    def encode(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), place: str = "") -> list[int]:
        """Token ids of a conversation up to the assistant's answer. Raises DataError where the template refuses it."""
        messages = list(messages)
        if self.system_prompt is not None and not any(message["role"] == "system" for message in messages):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        if self.raw:
            return text_token_ids(self.tokenizer, "".join(message["content"] for message in messages))
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                **self.template_kwargs,
            )
        except Exception as error:  # templates are programs of the model's authors; they raise what they like
            where = f"{place}: " if place else ""
            raise DataError(f"{where}refused by the target's chat template: {first_line(error)}") from None
        return list(encoded["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """An answer as it goes into the next turn's conversation."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def longest(self, prompts: Iterable[Prompt], max_new_tokens: int) -> int:
        """Tokens that the longest conversation may reach, answers included."""
        lengths = []
        for prompt in prompts:
            first, *later = (len(self.encode(step, prompt.tools, prompt.place)) for step in prompt.steps)
            lengths.append(first + sum(later) + len(prompt.steps) * max_new_tokens)
        return max(lengths)

    def encode_all(
        self, prompts: Sequence[Prompt], max_length: int, num_new_tokens: int = 1
    ) -> list[tuple[Prompt, list[int]]]:
        """Each prompt with the token ids of its first request. Left out, named and counted: those that leave fewer than
        `num_new_tokens` of `max_length` tokens for the answer. Raises DataError where none is left."""
        encoded: list[tuple[Prompt, list[int]]] = []
        errors = []
        for prompt in prompts:
            try:
                encoded.append((prompt, self.encode(prompt.steps[0], prompt.tools, prompt.place)))
            except DataError as error:
                errors.append(str(error))
        _raise_counted(errors, len(prompts))
        room = max_length - num_new_tokens
        too_long = [f"{p.place or p.id} ({len(ids)} tokens)" for p, ids in encoded if len(ids) > room]
        if too_long:
            named = ", ".join(too_long[:NUM_NAMED]) + (", ..." if len(too_long) > NUM_NAMED else "")
            why = f"{named}; prompt and {num_new_tokens} new token(s) together have at most {max_length}"
            if len(too_long) == len(encoded):
                raise DataError(f"no prompt fits: {why}")
            warn(f"{len(too_long)} of {len(prompts)} prompts are left out, too long: {why}")
        return [(prompt, ids) for prompt, ids in encoded if len(ids) <= room]


def encode_prompt_file(
    path: Path,
    limit: int | None,
    target_model_path: str,
    trust_remote_code: bool = False,
    max_length: int | None = None,
    num_new_tokens: int = 1,
) -> list[tuple[Prompt, list[int]]]:
    """The first `limit` prompts of a file for a target that is not loaded yet: all that can be wrong with them shows
    first. max_length: tokens of prompt and answer (default: the target's positions). Raises ConfigError, DataError."""
    prompts = read_prompts(path, limit)
    encoder = ChatEncoder.of_model(target_model_path, trust_remote_code)
    text_config = load_config(target_model_path, trust_remote_code).get_text_config()
    positions = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
    return encoder.encode_all(prompts, min(max_length or positions, positions), num_new_tokens)


def text_token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text. Special tokens that the tokenizer puts in front are left out where the text, such as one
    that a chat template rendered, begins with them already."""
    full = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    num_added = next((n for n in range(1, len(full) - len(bare) + 1) if full[n : n + len(bare)] == bare), 0)
    return bare if num_added and bare[:num_added] == full[:num_added] else full
