"""OPT (Zhang et al. 2022), pre-norm: separate Q, K, V; the block computes its MLP inline."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veiltune.models.family import Family, Segment


def _refuses(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it is post-norm (OPT-350m is), so its norms do not stand before the linears"
    if config.word_embed_proj_dim != config.hidden_size:
        return f"its embeddings are projected from {config.word_embed_proj_dim} to {config.hidden_size}"
    return None


def _call_mlp(block: Any, hidden: Tensor) -> Tensor:
    return block.fc2(block.activation_fn(block.fc1(hidden)))


def _replace_mlp(block: Any, stub: nn.Module) -> None:
    block.fc1, block.activation_fn, block.fc2 = stub, nn.Identity(), nn.Identity()


OPT = Family(
    name="OPT",
    model_types=("opt",),
    blocks="model.decoder.layers",
    attention=Segment(
        "attention",
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        norm="self_attn_layer_norm",
    ),
    mlp=Segment("mlp", None, ("fc1",), "fc2", norm="final_layer_norm"),
    final_norm="final_layer_norm",
    positions="embed_positions",
    residual_dropout="dropout",
    call_mlp=_call_mlp,
    replace_mlp=_replace_mlp,
    refuses=_refuses,
)
