"""Gemma 3, text: norms before and after each branch, QK-norm, windows and full attention in turn, scaled embeddings."""

from __future__ import annotations

from typing import Any

from veiltune.models.family import Family, Segment


def _refuses(config: Any) -> str | None:
    if config.use_bidirectional_attention:
        return "its attention looks both ways (it is an encoder)"
    if config.attn_logit_softcapping is not None:
        return (
            f"its attention scores are soft-capped at {config.attn_logit_softcapping}, which fused attention leaves out"
        )
    if config.final_logit_softcapping is not None:
        return f"its logits are soft-capped at {config.final_logit_softcapping}, which the loss here leaves out"
    return None


GEMMA3 = Family(
    name="Gemma 3",
    model_types=("gemma3_text",),
    blocks="model.layers",
    attention=Segment(
        "attention",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        exposed=("self_attn.q_norm", "self_attn.k_norm"),
        norm="input_layernorm",
        post_norm="post_attention_layernorm",
    ),
    mlp=Segment(
        "mlp",
        "mlp",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        norm="pre_feedforward_layernorm",
        post_norm="post_feedforward_layernorm",
    ),
    final_norm="norm",
    gain_offset=1.0,
    refuses=_refuses,
)
