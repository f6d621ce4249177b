"""A model that brings its own code, as MiniCPM4 does: Llama with scaled embeddings, residuals and logits. Copied beside
a config.json whose `auto_map` names it; transformers runs it only with `trust_remote_code`."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"

    def __init__(self, scale_emb=1, dim_model_base=1, scale_depth=1.0, **kwargs):
        self.scale_emb = scale_emb
        self.dim_model_base = dim_model_base
        self.scale_depth = scale_depth
        super().__init__(**kwargs)


class MiniCPMForCausalLM(LlamaForCausalLM):
    config_class = MiniCPMConfig

    def __init__(self, config):
        super().__init__(config)
        scale_emb, factor = config.scale_emb, config.scale_depth / config.num_hidden_layers**0.5
        self.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * scale_emb)
        for layer in self.model.layers:
            for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
                block.register_forward_hook(lambda module, inputs, output: output * factor)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **kwargs
    ):
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden = output.last_hidden_state[:, slice(-logits_to_keep, None) if logits_to_keep else slice(None)]
        logits = self.lm_head(hidden / (self.config.hidden_size / self.config.dim_model_base))
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
