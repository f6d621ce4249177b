"""vLLM: a KV connector, loaded by `--kv-transfer-config` (`kv_connector_module_path`), for the stock method
`extract_hidden_states`, which keeps the hidden states of every token in a KV-cache layer of its own (vllm 0.32).

A request opts in with `kv_transfer_params: {"specforge_capture": KEY}` and its reply carries
`kv_transfer_params.specforge_capture`. The sample is read from the cache in the step that completes its prompt, after
the cache was written and before the step's result is returned, so no block has to be held back.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from .sinks import SWITCH
from .writer import CaptureWriter

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass
class Save:
    """A prompt to capture: its key, its tokens, the cache blocks that hold its states, and whether a step has completed
    it."""

    key: str
    token_ids: list[int]
    block_ids: list[int]
    done: bool = False


@dataclass
class CaptureMetadata(KVConnectorMetadata):
    """From the scheduler's connector to the workers', once a step. saves: prompts that it completes. prefilled: keys of
    all captured prompts of which it runs a part."""

    saves: list[Save] = field(default_factory=list)
    prefilled: list[str] = field(default_factory=list)


class SpecforgeConnector(KVConnectorBase_V1, SupportsHMA):
    """Store-only connector; the scheduler's and each worker's process hold one."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        spec = vllm_config.speculative_config
        if spec is None or spec.method != "extract_hidden_states":
            raise ValueError("SpecforgeConnector needs --speculative-config with method extract_hidden_states")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("SpecforgeConnector: hidden states are kept on one pipeline rank only")
        model = vllm_config.model_config
        if model.dtype == torch.float16 and getattr(model.hf_text_config, "routed_scaling_factor", None):
            raise ValueError("SpecforgeConnector: float16 divides this model's hidden states; use --dtype bfloat16")
        self._layer_ids = list(spec.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)
        self._num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self._group = _hidden_state_group(kv_cache_config)
        if not os.environ.get(SWITCH):
            raise ValueError("set SPECFORGE_CAPTURE=tmpfs:DIRECTORY or mooncake:tcp://HOST:PORT")
        # The last captured "layer" is the residual stream after all layers, before the final norm.
        self._writer = CaptureWriter(f"vllm {vllm.__version__}", self._layer_ids[:-1], last_is_normed=False)
        self._prompts: dict[str, Save] = {}  # scheduler side, by request id
        self._cache: torch.Tensor | None = None  # worker side, [blocks, A + 1, block size, H]
        self._cache_layer = ""
        self._cached_this_step = False
        self._stale: set[str] = set()  # keys of prompts with a part that was not cached
        self._writes = True

    # ---------------------------------------------------------------- scheduler side
    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False  # nothing is ever loaded

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Follow the block tables of the prompts that asked for capture; name those that this step completes."""
        metadata = CaptureMetadata()
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            key = _key(new.sampling_params)
            if key is None or new.prompt_token_ids is None:
                continue
            prompt = Save(key, list(new.prompt_token_ids), list(new.block_ids[self._group]))
            self._prompts[new.req_id] = prompt
            self._note(prompt, new.num_computed_tokens + scheduled[new.req_id], metadata)
        cached = scheduler_output.scheduled_cached_reqs
        for req_id, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            found = self._prompts.get(req_id)
            if found is None:
                continue
            new_blocks = list(blocks[self._group]) if blocks is not None else []
            # A request that was preempted and resumed starts again with a block table of its own.
            found.block_ids = new_blocks if req_id in cached.resumed_req_ids else found.block_ids + new_blocks
            self._note(found, computed + scheduled[req_id], metadata)
        return metadata

    @staticmethod
    def _note(prompt: Save, num_computed: int, metadata: CaptureMetadata) -> None:
        if prompt.done:
            return
        metadata.prefilled.append(prompt.key)
        if num_computed >= len(prompt.token_ids):
            prompt.done = True
            metadata.saves.append(replace(prompt))  # a copy: its block table may change while the worker reads

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        prompt = self._prompts.pop(request.request_id, None)
        if prompt is None:
            return False, None
        reply = self._writer.reply(prompt.key) if prompt.done else {"error": "the request was aborted"}
        return False, {"specforge_capture": reply}

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    # ---------------------------------------------------------------- worker side
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer

        layers = get_layers_from_vllm_config(self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches))
        (self._cache_layer,) = layers
        self._cache = kv_caches[self._cache_layer]
        self._writes = get_tensor_model_parallel_rank() == 0
        if self._writes:
            self._writer.open()

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        if layer_name == self._cache_layer:
            self._cached_this_step = True

    def wait_for_save(self) -> None:
        """Called once a step, when the hidden-state layer has been written."""
        cached, self._cached_this_step = self._cached_this_step, False
        if not self._writes or not self.has_connector_metadata():
            return
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, CaptureMetadata)
        if not cached:
            # vLLM skips the layer for a whole batch when one prompt in it comes within 1 token of --max-model-len. The
            # blocks of a prompt that runs in several chunks then hold an earlier request's states for this chunk.
            self._stale.update(metadata.prefilled)
        for save in metadata.saves:
            if save.key in self._stale:
                self._stale.discard(save.key)
                self._writer.fail(save.key, "vLLM kept no hidden states of a part of it; raise --max-model-len")
            else:
                self._save(save)

    def _save(self, save: Save) -> None:
        assert self._cache is not None
        tokens, block_size = len(save.token_ids), self._cache.shape[2]
        blocks = torch.tensor(save.block_ids[: -(-tokens // block_size)], device="cpu")
        if self._cache.is_cuda:
            blocks = blocks.pin_memory().to(self._cache.device, non_blocking=True)
        # Indexing copies, on the stream the model runs on: the next step may overwrite these blocks.
        pages = self._cache[blocks].transpose(1, 2).flatten(0, 1)[:tokens]
        self._writer.submit(save.key, save.token_ids, pages[:, :-1].contiguous(), pages[:, -1].contiguous())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "LBNHC"  # all layers of a token side by side


def _hidden_state_group(kv_cache_config: KVCacheConfig) -> int:
    """The group whose block tables are those of the hidden-state layer: its own, or one it shares with other layers.

    Raises ValueError if no group holds it or several do: blocks of another group are other tokens' states.
    """
    groups = kv_cache_config.kv_cache_groups  # a group of merged specs keeps the names of its layers only
    found = [i for i, group in enumerate(groups) if any("cache_only_layers." in name for name in group.layer_names)]
    if len(found) != 1:
        raise ValueError(
            f"SpecforgeConnector: {len(found)} of {len(groups)} KV-cache groups hold hidden states, expected 1"
        )
    return found[0]


def _key(sampling_params: Any) -> str | None:
    extra = getattr(sampling_params, "extra_args", None) or {}
    params = extra.get("kv_transfer_params") or {}
    key = params.get("specforge_capture")
    return key if isinstance(key, str) else None
