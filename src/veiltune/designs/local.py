"""`local`: everything in the clear on the host. The yardstick, and what a user gives up nothing to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field

from veiltune.checkpoints import StateStore
from veiltune.config import Config, Section
from veiltune.designs.base import ENGINE_REVEALS, OWNER_REVEALS, PROVIDER_REVEALS, Design
from veiltune.engine import Engine, ParameterBackend
from veiltune.models.cut import Cut, empty_slots
from veiltune.models.families import find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.rotated import compute_norms_in_float64
from veiltune.models.skeleton import compute_dtype, config_from_json, empty_model, resolve_device
from veiltune.models.trainable import make_trainable
from veiltune.models.trunk import make_optimizer
from veiltune.parties.owner import join, own
from veiltune.parties.party import Party
from veiltune.parties.provider import provide
from veiltune.parties.weights import receive_weights
from veiltune.transport.messages import Goodbye, ModelCard
from veiltune.tuner import serve


class LocalOptions(Section):
    """The table ``[local]``."""

    layers: Literal["all", "owner", "top", "alone"] = Field(
        default="all",
        description="blocks that are trained: all, the owner's under [cut], or its top ones (baselines of split designs); "
        "alone: the owner's, with the trunk left out of the model (what it can do without a provider)",
    )
    norms: Literal["library", "precise"] = Field(
        default="library",
        description="precise: in float64 also RMSNorms, which transformers computes in float32 (baseline of veil)",
    )


def run_host(party: Party) -> None:
    """The host of `local`: plain weights, plain text, the training engine."""
    config, options = party.config, cast("LocalOptions", party.options)
    torch.manual_seed(config.seed)  # dropout's; a new process's generator starts anywhere
    device = resolve_device(config.device)
    dtype, rounded = compute_dtype(config.dtype, device)
    card = party.links["provider"].recv_as(ModelCard)
    model_config = config_from_json(card.config)
    model = empty_model(model_config)
    receive_weights(party.links["provider"], model, dtype, device)
    family = find_family(model_config)
    if dtype == torch.float64 and options.norms == "precise":
        compute_norms_in_float64(model, family)
    layers = trained_layers(config, model_config, options)
    if options.layers == "alone":
        empty_slots(model, family, [each for each in range(model_config.num_hidden_layers) if each not in layers])
    parameters = make_trainable(model, family, layers, config.lora, config.train.method, dtype=dtype, device=device)
    if rounded:
        round_between_operations(model)
    store = StateStore(party.directory, config.fingerprint())
    backend = ParameterBackend(parameters, make_optimizer(parameters, config.train), store)
    engine = Engine(model, backend, device, party.links["owner"].send)
    party.report("ready")
    serve(party.links["owner"], engine.handle, Goodbye)


def trained_layers(config: Config, model_config: Any, options: LocalOptions) -> Sequence[int]:
    """Indices of the blocks that are trained.

    Raises:
        ConfigError: the owner's blocks are asked for and ``[cut]`` does not fit the model.
    """
    if options.layers == "all":
        return range(model_config.num_hidden_layers)
    cut = Cut.of(model_config, config.cut.bottom_layers, config.cut.top_layers)
    return cut.top if options.layers == "top" else cut.owner_layers


def _exact(options: Any) -> bool:
    return options.layers != "alone"


_join = partial(join, trainer="host", attested=False)

LOCAL = Design(
    name="local",
    summary="everything in the clear on the host; the yardstick",
    options=LocalOptions,
    join=_join,
    roles={
        "owner": partial(own, join=_join),
        "provider": partial(provide, trainer="host", attested=False),
        "host": run_host,
    },
    links=(("owner", "provider"), ("owner", "host"), ("provider", "host")),
    data_plane=("provider", "host"),
    trainer="host",
    enclaves=frozenset(),
    reveals={"owner": OWNER_REVEALS, "provider": PROVIDER_REVEALS, "host": ENGINE_REVEALS},
    also_sees={"host": ("every weight, every token, the adapter and every gradient, in the clear",)},
    exactness="it is the plain computation, unless the trunk is left out of it",
    is_exact=_exact,
    methods=frozenset({"lora", "full"}),
)
