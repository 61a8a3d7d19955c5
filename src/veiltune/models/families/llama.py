"""Llama-like models: Llama, Mistral, Qwen2, Qwen3 (with QK-norm) and SmolLM: rotary positions, gated MLP, RMSNorm."""

from __future__ import annotations

from veiltune.models.family import Family, Segment

LLAMA = Family(
    name="Llama-like",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    blocks="model.layers",
    attention=Segment(
        "attention",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        exposed=("self_attn.q_norm", "self_attn.k_norm"),
        norm="input_layernorm",
    ),
    mlp=Segment("mlp", "mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", norm="post_attention_layernorm"),
    final_norm="norm",
)
