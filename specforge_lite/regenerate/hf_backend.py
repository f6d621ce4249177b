"""Answers from transformers inside this process: questions that wait are generated in batches of like length."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import replace
from typing import Any

from specforge_lite.capture.hf import load_target_model, place_target
from specforge_lite.core.hub import load_tokenizer
from specforge_lite.inference.hf_generate import GenerationRequest, GenerationResult, eos_token_ids_of, generate_batch
from specforge_lite.regenerate.answers import THOUGHT_OPENERS, split_answer
from specforge_lite.regenerate.turns import Answer, Question, RequestFailed

BATCHES_WAITING = 8
PROMPT_TAIL_TOKENS = 8  # enough to see whether the prompt opens the reasoning


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
        opened = next((opener for opener in THOUGHT_OPENERS if tail.endswith(opener)), "")
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
        sampling = question.sampling
        prompt_ids = question.prompt_ids if question.prompt_ids is not None else self._render(question)
        room = self.max_length - len(prompt_ids)
        if room < 1:
            detail = f"the prompt has {len(prompt_ids)} tokens, the target takes {self.max_length}"
            raise RequestFailed("prompt-too-long", detail)
        return GenerationRequest(
            prompt_ids, min(sampling.max_tokens, room), sampling.temperature, sampling.top_p, sampling.seed
        )

    def _render(self, question: Question) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RequestFailed("chat-template", "the target's tokenizer has no chat template")
        try:
            encoded = self.tokenizer.apply_chat_template(
                question.messages, tools=question.tools, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # templates are programs of the model's authors; they raise what they like
            raise RequestFailed("chat-template", f"{type(error).__name__}: {error}") from None
        return list(encoded["input_ids"])

    async def _run(self) -> None:
        await asyncio.sleep(0)  # let every row that is ready put its question first
        while self._waiting:
            batch = take_alike(self._waiting, self.batch_size)
            self._running = len(batch)
            requests = [request for request, _ in batch]
            try:
                results = await asyncio.to_thread(
                    generate_batch,
                    self.lm,
                    requests,
                    self.eos_token_ids,
                    self.tokenizer.pad_token_id or 0,
                    self._stopped.is_set,
                )
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            finally:
                self._running = 0
            for (_, future), result in zip(batch, results):
                if not future.done():
                    future.set_result(result)
            await asyncio.sleep(0)  # rows that go on, or new ones, join the next batch

    def _to_answer(self, result: GenerationResult, is_chat: bool, opened: str = "", has_tools: bool = False) -> Answer:
        text = self.tokenizer.decode(result.token_ids, skip_special_tokens=not is_chat)
        if not is_chat:
            return Answer(text, result.finish_reason, completion_tokens=len(result.token_ids))
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        is_cut = result.finish_reason == "length"
        reasoning, content, calls = split_answer(text, special, opened, has_tools, is_cut)
        finish_reason = "tool_calls" if calls and not is_cut else result.finish_reason
        return Answer(content, finish_reason, reasoning, calls, len(result.token_ids))


def take_alike(waiting: list[tuple[GenerationRequest, Any]], count: int) -> list[tuple[GenerationRequest, Any]]:
    """Remove and return the oldest question and those nearest to it in prompt length, `count` in all."""
    oldest = len(waiting[0][0].prompt_ids)
    order = sorted(range(len(waiting)), key=lambda i: (abs(len(waiting[i][0].prompt_ids) - oldest), i))
    chosen = set(order[:count])
    taken = [item for i, item in enumerate(waiting) if i in chosen]
    waiting[:] = [item for i, item in enumerate(waiting) if i not in chosen]
    return taken
