"""GPT-2 (Radford et al. 2019): fused QKV, `Conv1D` weights stored (in, out), dropout inside attention and MLP."""

from __future__ import annotations

from typing import Any

from veiltune.models.family import Family, Segment


def _refuses(config: Any) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "it has cross-attention, which a decoder-only cut does not cover"
    return None


GPT2 = Family(
    name="GPT-2",
    model_types=("gpt2",),
    blocks="transformer.h",
    attention=Segment("attention", "attn", ("attn.c_attn",), "attn.c_proj", dropout="attn.resid_dropout", norm="ln_1"),
    mlp=Segment("mlp", "mlp", ("mlp.c_fc",), "mlp.c_proj", dropout="mlp.dropout", norm="ln_2"),
    final_norm="ln_f",
    positions="wpe",
    embedding_dropout="drop",
    weights_in_out=True,
    residual_dropout="resid_pdrop",
    refuses=_refuses,
)
