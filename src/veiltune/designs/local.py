"""`local`: everything in the clear on the host. The yardstick, and what a user gives up nothing to compare with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import BaseModel

from veiltune.checkpoints import StateStore
from veiltune.config import Section
from veiltune.designs.base import ENGINE_REVEALS, OWNER_REVEALS, PROVIDER_REVEALS, Design
from veiltune.engine import Engine, ParameterBackend
from veiltune.models.adapters import (
    adapted_linears,
    factor_dtype,
    factor_parameters,
    initial_factors,
    inject_adapters,
    place_factors,
)
from veiltune.models.families import find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.skeleton import (
    assign_parameter,
    compute_dtype,
    config_from_json,
    empty_model,
    require_complete,
    resolve_device,
)
from veiltune.models.trunk import make_optimizer
from veiltune.parties.owner import own
from veiltune.parties.party import Party
from veiltune.parties.provider import provide
from veiltune.transport.messages import Acknowledged, Goodbye, ModelCard, WeightShard
from veiltune.tuner import serve


class LocalOptions(Section):
    """`local` has no options."""


def receive_weights(party: Party, model: Any, dtype: Any, device: Any) -> None:
    """Fill an empty model from the provider's stream, and tie what its configuration ties."""
    while True:
        shard = party.links["provider"].recv_as(WeightShard)
        for name, value in shard.tensors.items():
            assign_parameter(model, name, value.to(device, dtype))
        party.links["provider"].send(Acknowledged())
        if shard.last:
            break
    model.tie_weights()
    require_complete(model)
    model.to(device)


def run_host(party: Party) -> None:
    """The host of `local`: plain weights, plain text, the training engine."""
    config = party.config
    torch.manual_seed(config.seed)  # dropout's; a new process's generator starts anywhere
    device = resolve_device(config.device)
    dtype, rounded = compute_dtype(config.dtype, device)
    card = party.links["provider"].recv_as(ModelCard)
    model_config = config_from_json(card.config)
    model = empty_model(model_config)
    receive_weights(party, model, dtype, device)
    family = find_family(model_config)
    num_layers = model_config.num_hidden_layers
    model.requires_grad_(requires_grad=False)
    linears = adapted_linears(family, num_layers, config.lora)
    shapes = {linear.path: _fan(model.get_submodule(linear.path), in_out=family.weights_in_out) for linear in linears}
    inject_adapters(model, config.lora, family, num_layers)
    place_factors(
        model,
        {name: value.to(device) for name, value in initial_factors(shapes, config.lora, factor_dtype(dtype)).items()},
    )
    parameters = factor_parameters(model, [linear.path for linear in linears])
    if rounded:
        round_between_operations(model)
    store = StateStore(party.directory, config.fingerprint())
    backend = ParameterBackend(parameters, make_optimizer(parameters, config.train), store)
    engine = Engine(model, backend, device, party.links["owner"].send)
    party.report("ready")
    serve(party.links["owner"], engine.handle, Goodbye)


def _fan(linear: Any, *, in_out: bool) -> tuple[int, int]:
    rows, columns = linear.weight.shape
    return (rows, columns) if in_out else (columns, rows)


def _exact(_: BaseModel) -> bool:
    return True


LOCAL = Design(
    name="local",
    summary="everything in the clear on the host; the yardstick",
    options=LocalOptions,
    roles={
        "owner": partial(own, trainer="host", attested=False),
        "provider": partial(provide, trainer="host", attested=False),
        "host": run_host,
    },
    links=(("owner", "provider"), ("owner", "host"), ("provider", "host")),
    data_plane=("provider", "host"),
    trainer="host",
    enclaves=frozenset(),
    reveals={"owner": OWNER_REVEALS, "provider": PROVIDER_REVEALS, "host": ENGINE_REVEALS},
    also_sees={"host": ("every weight, every token, the adapter and every gradient, in the clear",)},
    exactness="it is the plain computation",
    is_exact=_exact,
)
