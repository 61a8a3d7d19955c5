"""Who gets what was trained in an enclave: what was agreed on (``adapter.to``) is kept to here, and by nobody's good will.

The owner asks for its copy, or has the enclave send the provider one. Whoever is not to have the adapter does not get the
gradients either, which would tell it. With ``nobody`` the adapter stays in the enclave's sealed state, and later sessions of
the same run answer questions with it.
"""

from __future__ import annotations

from typing import Any

from veiltune.engine import Engine
from veiltune.errors import ConfigError, ProtocolError
from veiltune.models.adapters import save_adapter
from veiltune.models.families import find_family
from veiltune.parties.party import Party
from veiltune.transport.messages import (
    Acknowledged,
    AdapterRequest,
    AdapterTensors,
    Goodbye,
    GradientsRequest,
    HandOver,
    Message,
)

ADAPTER = "adapter"
"""The directory of an adapter, in a run's output and in a provider's own directory."""


def keep_to_policy(engine: Engine, party: Party) -> Engine:
    """The engine, which from now on refuses what was not agreed on."""
    policy = party.config.adapter

    def refused(request: Message) -> Message:
        raise ConfigError(
            f"{type(request).__name__}: it was agreed that the adapter goes to {policy.to}",
            hint="change adapter.to in every party's configuration",
        )

    def hand_over(_: Message) -> Message:
        party.links["provider"].send(AdapterTensors(engine.backend.factors()))
        return party.links["provider"].recv_as(Acknowledged)

    if not policy.goes_to("owner"):
        engine.answer_with(AdapterRequest, refused)
        engine.answer_with(GradientsRequest, refused)
    engine.answer_with(HandOver, hand_over if provider_waits(party) else refused)
    return engine


def provider_waits(party: Party) -> bool:
    """Whether the provider stays for the adapter until the end of this session."""
    return party.job.verb == "tune" and party.config.adapter.goes_to("provider")


def let_provider_go(party: Party) -> None:
    """The enclave's last word to a provider that waits."""
    if provider_waits(party):
        party.links["provider"].send(Goodbye())


def receive_adapter(party: Party, trainer: str, model_config: Any) -> None:
    """The provider's side: keep what comes in PEFT's format, in its own directory, until the enclave says goodbye.

    Raises:
        PeerLostError: the enclave is gone.
        ProtocolError: it sends something else.
    """
    link, config = party.links[trainer], party.config
    while not isinstance(message := link.recv(), Goodbye):
        if not isinstance(message, AdapterTensors):
            raise ProtocolError(f"the {trainer} sent {type(message).__name__}, an adapter was due")
        family, num_layers = find_family(model_config), model_config.num_hidden_layers
        save_adapter(party.directory / ADAPTER, message.tensors, config.lora, family, num_layers, config.model)
        link.send(Acknowledged())
        party.report("adapter_received", {"tensors": len(message.tensors)})
