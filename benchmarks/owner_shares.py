"""Shares of parameters and of forward FLOPs that a cut leaves to the data owner, from configurations alone.

What the owner holds it got from the provider, in the clear; an emulator adds to it. The provider holds all of its model.
"""

from __future__ import annotations

from benchmarks._record import Row, run
from benchmarks._runs import SMOLLM2
from veiltune.models.cut import Cut
from veiltune.models.cut_accounting import cut_shares
from veiltune.models.sources import resolve_config

MODELS = {
    "SmolLM2-135M": SMOLLM2,
    "GPT-2 small": "random:gpt2-small",
    "GPT2-XL": "random:gpt2-xl",
    "OPT-1.3B": "random:opt-1.3b",
    "OPT-6.7B": "random:opt-6.7b",
    "Qwen2-0.5B": "random:qwen2-0.5b",
}
CUTS = ((1, 1), (2, 2), (4, 4))
BATCH, LENGTH = 4, 128


def measure(quick: bool) -> list[Row]:
    """One row a model and cut. ``quick`` counts one model."""
    return [row(model, *layers) for model in (["GPT-2 small"] if quick else MODELS) for layers in CUTS]


def row(model: str, bottom_layers: int, top_layers: int) -> Row:
    """The owner's shares of one model under one cut."""
    config = resolve_config(MODELS[model])
    counted = cut_shares(config, Cut.of(config, bottom_layers, top_layers), BATCH, LENGTH)
    return {
        "model": model,
        "bottom_layers": bottom_layers,
        "top_layers": top_layers,
        "num_parameters": counted.num_parameters,
        "owner_share": counted.owner_share,
        "flop_share": counted.flop_share,
        "lora_parameters_rank_16": 16 * counted.lora_parameters_per_rank,
    }


if __name__ == "__main__":
    run("owner_shares", str(__doc__), measure)
