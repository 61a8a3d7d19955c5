"""What a host really saw, as the scorer knows it: blocks before its own, true states there, true weights, ancestors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veiltune.attacks import EmbeddingTable
from veiltune.attacks.folded import fold_openly
from veiltune.attacks.veiled import cut_states
from veiltune.config import Config
from veiltune.designs import DESIGNS
from veiltune.evaluation.truth import TruePass
from veiltune.models.cut import Cut
from veiltune.models.families import find_family
from veiltune.session.party_main import design_options


def enclave_layers(config: Config) -> int:
    """Blocks of the model that run in the enclave before the states that the host is sent."""
    if config.design == "veil":
        options: Any = design_options(DESIGNS["veil"], config.design_options)
        return int(options.enclave_layers)
    return 0


@torch.no_grad()
def first_states(model: nn.Module, config: Config, texts: Iterable[Sequence[int]]) -> list[Tensor]:
    """The plain states that stand behind the first masked ones of texts."""
    layers = enclave_layers(config)
    if layers:
        return [cut_states(model, layers, text) for text in texts]
    table = EmbeddingTable(model)
    form = table.form(config.design)
    return [table.states(torch.tensor(text), torch.arange(len(text)), form) for text in texts]


def trunk_weights(model: Any, design: str) -> dict[str, Tensor]:
    """The weights that a host's are a disguise of: the plain ones, under `veil` with norms and centring folded in."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    if design != "veil":
        return parameters
    prefix = f"{find_family(model.config).blocks}."
    blocks = {name: value for name, value in parameters.items() if name.startswith(prefix)}
    return fold_openly(blocks, model.config, Cut.of(model.config, 0, 0))


def ancestor_model(model: nn.Module, ancestor: Mapping[str, Tensor]) -> nn.Module:
    """The model with an ancestor's blocks in it; embeddings, final norm and head as they are."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in ancestor.items():
            other.get_parameter(name).copy_(value)
    return other


def texts_of(passes: Mapping[int, TruePass]) -> list[list[int]]:
    """Every text that crossed."""
    return [
        ids[: int(mask.sum())].tolist()
        for number in sorted(passes)
        for ids, mask in zip(passes[number].ids, passes[number].mask, strict=True)
    ]
