"""Answers from transformers inside this process: questions that wait are generated in batches of like length, and the
text of an answer, special tokens included, becomes reasoning, content and tool calls as servers report them.

Read are `<think>` and `[THINK]`, gpt-oss's channels, and tool calls as Hermes and Qwen (JSON or XML), Phi-4-mini,
Mistral, DeepSeek and Llama 3 write them. What is left over and holds a special token is refused: as plain text it would
be trained as other tokens than the target's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from specforge_lite.capture.hf import load_target_model, place_target
from specforge_lite.core.errors import ConfigError, DataError
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.data.prompts import ChatEncoder
from specforge_lite.inference.hf_generate import GenerationRequest, GenerationResult, eos_token_ids_of, generate_batch
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

BATCHES_WAITING = 8
PROMPT_TAIL_TOKENS = 8  # enough to see whether the prompt opens the reasoning


_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
# [to=functions.NAME] <|channel|> CHANNEL [to=functions.NAME] [<|constrain|> json] <|message|> TEXT <|end|>
_CHANNEL = re.compile(
    r"(?:<\|start\|>assistant)?(?P<to>[^<]*)<\|channel\|>(?P<channel>\w+)(?P<header>[^<]*)(?:<\|constrain\|>[^<]*)?"
    r"<\|message\|>(?P<text>.*?)(?:<\|(?:end|call|return)\|>|\Z)",
    re.DOTALL,
)
# What a call (or a list of calls) begins with -> all of it: a group `json`, or `name` and `arguments` (or `xml`).
_CALL_FORMS = {
    "<tool_call>": r"""<tool_call>\s*
        (?:<function=(?P<name>[^>\s]+)>(?P<xml>.*?)</function>|(?P<json>.*?))\s*</tool_call>""",
    "<|tool_call|>": r"<\|tool_call\|>(?P<json>.*?)<\|/tool_call\|>",
    "[TOOL_CALLS]": r"""(?:\[TOOL_CALLS\])?\s*
        (?:(?P<json>\[.*\])|(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?(?P<arguments>\{.*?\}))
        (?=\s*(?:\[TOOL_CALLS\]|\Z))""",
    "<｜tool▁calls▁begin｜>": r"""(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?
        (?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)(?P<arguments>.*?)(?:\n```)?<｜tool▁call▁end｜>
        (?:<｜tool▁calls▁end｜>)?""",
    "<|python_tag|>": r"(?:<\|python_tag\|>|;)\s*(?P<json>\{.*?\})(?=\s*(?:;\s*\{|\Z))",
}
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


class HfBackend:
    """Answers questions with a model of transformers. One event loop; generation runs in one other thread."""

    def __init__(self, model_path: str, dtype: str, batch_size: int, trust_remote_code: bool = False) -> None:
        self.model = os.path.abspath(model_path) if os.path.isdir(model_path) else model_path
        self.lm = load_target_model(model_path, dtype, place_target(model_path, dtype, None), trust_remote_code)
        self.tokenizer: Any = load_tokenizer(model_path, trust_remote_code)
        self.batch_size = batch_size
        self.num_places = BATCHES_WAITING * batch_size  # enough to find `batch_size` questions of like length
        text_config = self.lm.config.get_text_config()
        self.max_length = int(getattr(text_config, "max_position_embeddings", None) or 1 << 30)
        self.eos_token_ids = eos_token_ids_of(self.lm, self.tokenizer)
        self._waiting: list[tuple[GenerationRequest, asyncio.Future[GenerationResult]]] = []
        self._runner: asyncio.Task[None] | None = None
        self._running = 0
        self._stopped = threading.Event()

    @property
    def status(self) -> str:
        """For the progress bar."""
        return f"generating {self._running}, waiting {len(self._waiting)}"

    async def answer(self, question: Question) -> Answer:
        """Generate the next turn. Raises RequestFailed for a prompt that fills the context, or an answer of a form that
        is not known."""
        request = self._request(question)
        self.eos_token_ids += [token for token in question.stop_token_ids if token not in self.eos_token_ids]
        future: asyncio.Future[GenerationResult] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        result = await future
        tail = self.tokenizer.decode(request.prompt_ids[-PROMPT_TAIL_TOKENS:]).rstrip()
        opened = next((opening for opening, _ in _THOUGHTS if tail.endswith(opening)), "")
        has_end = result.finish_reason == "stop"
        shown = replace(result, token_ids=result.token_ids[:-1]) if has_end else result
        answer = self._to_answer(shown, question.prompt_ids is None, opened, bool(question.tools))
        return replace(answer, completion_tokens=len(result.token_ids))

    async def aclose(self) -> None:
        """Stop within SEGMENT_TOKENS tokens."""
        self._stopped.set()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)

    def _request(self, question: Question) -> GenerationRequest:
        prompt_ids, sampling = question.prompt_ids, question.sampling
        if prompt_ids is None:
            try:
                prompt_ids = ChatEncoder(self.tokenizer).encode(question.messages, question.tools or ())
            except (ConfigError, DataError) as error:
                raise RequestFailed("chat-template", str(error)) from None
        room = self.max_length - len(prompt_ids)
        if room < 1:
            detail = f"the prompt has {len(prompt_ids)} tokens, the target takes {self.max_length}"
            raise RequestFailed("prompt-too-long", detail)
        num_new = min(sampling.max_tokens, room)
        return GenerationRequest(prompt_ids, num_new, sampling.temperature, sampling.top_p, sampling.seed)

    async def _run(self) -> None:
        await asyncio.sleep(0)  # let every row that is ready put its question first
        while self._waiting:
            batch = take_alike(self._waiting, self.batch_size)
            requests, futures = [request for request, _ in batch], [future for _, future in batch]
            self._running = len(batch)
            pad = self.tokenizer.pad_token_id or 0
            work = asyncio.to_thread(generate_batch, self.lm, requests, self.eos_token_ids, pad, self._stopped.is_set)
            results = (await asyncio.gather(work, return_exceptions=True))[0]
            self._running = 0
            for i, future in enumerate(futures):
                if future.done():
                    continue
                if isinstance(results, BaseException):
                    future.set_exception(results)
                else:
                    future.set_result(results[i])
            await asyncio.sleep(0)  # rows that go on, or new ones, join the next batch

    def _to_answer(self, result: GenerationResult, is_chat: bool, opened: str = "", has_tools: bool = False) -> Answer:
        text = self.tokenizer.decode(result.token_ids, skip_special_tokens=not is_chat)
        if not is_chat:
            return Answer(text, result.finish_reason)
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        is_cut = result.finish_reason == "length"
        reasoning, content, calls = split_answer(text, special, opened, has_tools, is_cut)
        finish_reason = "tool_calls" if calls and not is_cut else result.finish_reason
        return Answer(content, finish_reason, reasoning, calls)


def take_alike(waiting: list[tuple[GenerationRequest, Any]], count: int) -> list[tuple[GenerationRequest, Any]]:
    """Remove and return the oldest question and those nearest to it in prompt length, `count` in all."""
    oldest = len(waiting[0][0].prompt_ids)
    nearest = sorted(range(len(waiting)), key=lambda i: (abs(len(waiting[i][0].prompt_ids) - oldest), i))
    return [waiting.pop(i) for i in sorted(nearest[:count], reverse=True)][::-1]


def split_answer(
    text: str, special_tokens: Iterable[str], opened: str = "", has_tools: bool = False, is_cut: bool = False
) -> tuple[str, str, list[dict[str, Any]]]:
    """(reasoning, content, tool calls in OpenAI's form). opened: how a thought begins, if the prompt
    ended with that; is_cut: a token limit ended the answer. Raises RequestFailed where the form is not known."""
    if "<|channel|>" in text:
        reasoning, content, calls = _split_channels(text, is_cut)
    else:
        reasoning, content = _split_thought(text, opened)
        content, calls = _split_calls(content, has_tools)
    token = next((t for t in special_tokens if t and (t in content or t in reasoning)), None)
    if token is not None:
        raise RequestFailed("answer-form", f"the answer holds {token}, in a form that is not known here: {text[:80]!r}")
    return reasoning, content, calls


def _split_thought(text: str, opened: str) -> tuple[str, str]:
    for opening, closing in _THOUGHTS:
        body = text.lstrip()
        if body.startswith(opening) or closing in text or opened == opening:
            reasoning, _, content = body.removeprefix(opening).partition(closing)
            return reasoning.strip(), content.lstrip()
    return "", text


def _split_channels(text: str, is_cut: bool) -> tuple[str, str, list[dict[str, Any]]]:
    found: dict[str, str] = {}
    calls: list[dict[str, Any]] = []
    at = 0
    while match := _CHANNEL.match(text, at):
        at, channel = match.end(), match["channel"]
        to = next(iter(re.findall(r"to=(\S+)", f"{match['to']} {match['header']}")), "")
        if to.startswith("functions."):
            calls.append(_call(to.removeprefix("functions."), match["text"]))
        elif not to and channel in ("analysis", "final") and channel not in found:
            found[channel] = match["text"]
        else:
            where = f"{channel} to {to}" if to else f"{channel} (a second time, or an unknown channel)"
            raise RequestFailed("answer-form", f"channel {where}; expected analysis, final and calls of functions")
    if not at or (("<|message|>" in text[at:] or not is_cut) and text[at:].strip()):
        raise RequestFailed("answer-form", f"not a sequence of channels: {text[at : at + 80]!r}")
    return found.get("analysis", ""), found.get("final", ""), calls


def _split_calls(text: str, has_tools: bool) -> tuple[str, list[dict[str, Any]]]:
    start, form = min(((at, form) for form in _CALL_FORMS if (at := text.find(form)) >= 0), default=(-1, ""))
    if start < 0 and has_tools and re.match(r'\s*\{\s*"name"\s*:', text):  # Llama 3 has no mark
        start, form, text = 0, "<|python_tag|>", "<|python_tag|>" + text
    if start < 0:
        return text, []
    calls: list[dict[str, Any]] = []
    content, rest = text[:start].rstrip(), text[start:].strip()
    while rest:
        match = re.match(_CALL_FORMS[form], rest, re.DOTALL | re.VERBOSE)
        if match is None:
            raise RequestFailed("answer-form", f"not a tool call: {rest[:80]!r}")
        calls += _calls_of({"json": None, "xml": None, "id": None, **match.groupdict()})
        rest = rest[match.end() :].strip()
    return content, calls


def _calls_of(groups: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if groups["xml"] is not None:
        yield _call(groups["name"], dict(_PARAMETER.findall(groups["xml"])))
    elif groups["json"] is None:
        yield _call(groups["name"], groups["arguments"], groups["id"])
    else:
        value = _parsed(groups["json"])
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise RequestFailed("answer-form", f"a tool call without a name: {groups['json'][:80]!r}")
            yield _call(one["name"], one.get("arguments", one.get("parameters", {})), one.get("id"))


def _call(name: str, arguments: Any, call_id: Any = None) -> dict[str, Any]:
    if isinstance(arguments, str):
        _parsed(arguments)  # kept as the target wrote it, if it is JSON
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    extra = {"id": call_id} if isinstance(call_id, str) else {}
    return {**extra, "type": "function", "function": {"name": name.strip(), "arguments": arguments}}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestFailed("answer-form", f"a tool call that is not JSON: {text[:80]!r}") from None
