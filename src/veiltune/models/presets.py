"""Configurations for ``random:`` models: tiny ones of any size per family, and published shapes by name.

The published shapes (layers, widths, vocabularies, tied heads, positions, biases, dropout) are those of the models'
public configuration files. Token ids are those of the byte-level tokenizer that random models carry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from veiltune.errors import ModelError, nearest

PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
MIN_VOCABULARY = 259
"""256 bytes and three special tokens."""

_TINY_POSITIONS = 1024
_TOKENS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def _tiny_gpt2(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "vocab_size": vocab,
        "n_positions": _TINY_POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _tiny_opt(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return _opt(layers, hidden, heads) | {
        "vocab_size": vocab,
        "max_position_embeddings": _TINY_POSITIONS,
        "dropout": 0.0,
    }


def _tiny_llama(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 8 // 3 // 8) * 8,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "vocab_size": vocab,
        "max_position_embeddings": _TINY_POSITIONS,
        "tie_word_embeddings": False,
    }


def _tiny_mistral(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return _tiny_llama(layers, hidden, heads, vocab) | {"model_type": "mistral", "sliding_window": None}


def _tiny_qwen2(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    return _tiny_llama(layers, hidden, heads, vocab) | {"model_type": "qwen2", "tie_word_embeddings": True}


def _tiny_qwen3(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    # As in the published small models, the heads together are wider than the hidden state.
    values = _tiny_llama(layers, hidden, heads, vocab)
    return values | {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 2 * hidden // heads}


def _tiny_gemma3(layers: int, hidden: int, heads: int, vocab: int) -> dict[str, Any]:
    """As in the published ones heads are wide together, and windows alternate with full attention (here one by one)."""
    values = _tiny_llama(layers, hidden, heads, vocab)
    kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    return values | _gemma3(2 * hidden // heads, kinds) | {"model_type": "gemma3_text", "sliding_window": 16}


def _gemma3(head_dim: int, kinds: list[str]) -> dict[str, Any]:
    return {
        "tie_word_embeddings": True,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": 512,
        "layer_types": kinds,
        "rope_parameters": {"full_attention": _theta(1000000.0), "sliding_attention": _theta(10000.0)},
    }


def _five_to_one(layers: int) -> list[str]:
    return ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]


def _gpt2(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": hidden,
        "n_head": heads,
        "vocab_size": 50257,
        "n_positions": 1024,
    }


def _opt(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
    }


def _rotary(
    model_type: str, layers: int, hidden: int, wide: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


def _theta(base: float) -> dict[str, Any]:
    return {"rope_theta": base, "rope_type": "default"}


FAMILIES: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "gpt2": _tiny_gpt2,
    "opt": _tiny_opt,
    "llama": _tiny_llama,
    "mistral": _tiny_mistral,
    "qwen2": _tiny_qwen2,
    "qwen3": _tiny_qwen3,
    "gemma3": _tiny_gemma3,
}
"""Family name to a function (layers, hidden, heads, vocab) -> configuration values."""

DEFAULT_SIZES = (2, 64, 4, 384)
"""Layers, hidden width, heads and vocabulary of ``random:FAMILY``."""

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "smollm2-135m": _rotary(
        "llama", 30, 576, 1536, 9, 3, 49152,
        tie_word_embeddings=True, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=_theta(100000.0),
    ),
    "tinyllama-1.1b": _rotary(
        "llama", 22, 2048, 5632, 32, 4, 32000,
        tie_word_embeddings=False, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_parameters=_theta(10000.0),
    ),
    "llama-2-7b": _rotary(
        "llama", 32, 4096, 11008, 32, 32, 32000,
        tie_word_embeddings=False, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_parameters=_theta(10000.0),
    ),
    "mistral-7b": _rotary(
        "mistral", 32, 4096, 14336, 32, 8, 32000,
        tie_word_embeddings=False, max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=4096,
        rope_parameters=_theta(10000.0),
    ),
    "qwen2-0.5b": _rotary(
        "qwen2", 24, 896, 4864, 14, 2, 151936,
        tie_word_embeddings=True, max_position_embeddings=131072, rms_norm_eps=1e-6, rope_parameters=_theta(1000000.0),
    ),
    "qwen3-0.6b": _rotary(
        "qwen3", 28, 1024, 3072, 16, 8, 151936, head_dim=128,
        tie_word_embeddings=True, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_parameters=_theta(1000000.0),
    ),
    "gemma3-270m": _rotary(
        "gemma3_text", 18, 640, 2048, 4, 1, 262144,
        max_position_embeddings=32768, rms_norm_eps=1e-6, **_gemma3(256, _five_to_one(18)),
    ),
    "gemma3-1b": _rotary(
        "gemma3_text", 26, 1152, 6912, 4, 1, 262144,
        max_position_embeddings=32768, rms_norm_eps=1e-6, **_gemma3(256, _five_to_one(26)),
    ),
}  # fmt: skip
"""Published shapes by name."""


def random_config(spec: str) -> Any:
    """The configuration of ``FAMILY``, ``FAMILY:layers,hidden,heads,vocab`` or ``PRESET`` (``random:`` may precede).

    No weights are made: this is what cost studies on large models need.

    Raises:
        ModelError: an unknown family or preset, or sizes that do not fit together.
    """
    from transformers import AutoConfig

    name, separator, sizes = spec.removeprefix("random:").partition(":")
    if name in PRESETS and not separator:
        values = dict(PRESETS[name])
    elif name in FAMILIES:
        values = FAMILIES[name](*_sizes(sizes if separator else None, name))
    else:
        what = "takes no sizes" if name in PRESETS else "is neither a family nor a preset"
        raise ModelError(f"random model {name!r} {what}", hint=nearest(name, [*FAMILIES, *PRESETS]))
    return AutoConfig.for_model(values.pop("model_type"), **values, **_TOKENS)


def _sizes(text: str | None, family: str) -> tuple[int, int, int, int]:
    if text is None:
        return DEFAULT_SIZES
    hint = f"write random:{family}:layers,hidden,heads,vocab, for example random:{family}:2,64,4,384"
    try:
        layers, hidden, heads, vocab = (int(part) for part in text.split(","))
    except ValueError:
        raise ModelError(f"random model sizes {text!r} are not four integers", hint=hint) from None
    if min(layers, hidden, heads) < 1 or hidden % heads:
        raise ModelError(f"random model sizes {text!r}: the heads must divide the hidden width", hint=hint)
    if family not in {"gpt2", "opt"} and (hidden // heads) % 2:
        raise ModelError(f"random model sizes {text!r}: a rotary head's width must be even", hint=hint)
    if vocab < MIN_VOCABULARY:
        raise ModelError(
            f"random model vocabulary {vocab} is below {MIN_VOCABULARY} (256 bytes and 3 specials)", hint=hint
        )
    return layers, hidden, heads, vocab
