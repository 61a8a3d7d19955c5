"""Shares of parameters and of forward FLOPs in ObfuscaTune's enclave, from configurations alone.

The published figure for the share of parameters is "about 5%" (arXiv 2407.02960); by the published shapes that is GPT-2
XL, and the smaller models have more. What is counted, and how, stands in `veiltune.models.accounting`.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from veiltune.models.accounting import shares
from veiltune.models.family import Placement
from veiltune.models.presets import random_config

MODELS = ("gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "opt-1.3b", "opt-6.7b")
PLACEMENTS: tuple[Placement, ...] = ("paper", "compact")
BATCH, LENGTH = 4, 128

PUBLISHED = {"gpt2-small": 0.317, "gpt2-medium": 0.148, "gpt2-large": 0.085, "gpt2-xl": 0.053}
"""Shares of parameters computed from the published shapes; the paper prints "about 5%"."""


def measure(quick: bool) -> list[Row]:
    """One row per model and placement. ``quick`` counts the smallest model of each family."""
    models = ("gpt2-small", "opt-1.3b") if quick else MODELS
    return [row(model, placement) for model in models for placement in PLACEMENTS]


def row(model: str, placement: Placement) -> Row:
    """The shares of one model under one placement."""
    counted = shares(random_config(model), placement, BATCH, LENGTH)
    published = {"published_param_share": PUBLISHED[model]} if model in PUBLISHED else {}
    return {
        "model": model,
        "design": "obfuscatune",
        "placement": placement,
        "batch": BATCH,
        "length": LENGTH,
        "param_share": counted.param_share,
        "flop_share": counted.flop_share,
        "mask_flop_share": counted.mask_flops / counted.flops,
        "num_parameters": counted.num_parameters,
        "enclave_parameters": counted.enclave_parameters,
        "key_elements": counted.key_elements,
        "lora_parameters_rank_16": counted.lora_parameters(16),
        **published,
    }


if __name__ == "__main__":
    run("enclave_shares", str(__doc__), measure)
