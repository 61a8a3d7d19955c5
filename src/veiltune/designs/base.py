"""What a design is: a table of who is linked to whom, who runs what, and who sees what; and its own options.

``reveals`` is enforced: a channel neither sends nor accepts a kind of message that the receiving observer's table lacks. So
whoever reads the table knows all that an observer can see, and a new message that nobody declared fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from pydantic import BaseModel

from veiltune.parties.enclaved import EnclaveSession, HostSession, run_enclave, run_host
from veiltune.parties.owner import Owner, join, own
from veiltune.parties.party import Party
from veiltune.parties.provider import provide
from veiltune.parties.split import Planner, join_with_layers, open_trunk, provide_trunk
from veiltune.transport.channel import Channel
from veiltune.transport.messages import ModelCard, TrunkPlan

Form = Literal["public", "clear", "masked", "control"]
"""``public``: no secret of anyone. ``clear``: readable as it is. ``masked``: under a key. ``control``: figures and requests."""


@dataclass(frozen=True)
class Reveal:
    """What an observer learns from one kind of message it receives."""

    what: str
    form: Form


@dataclass(frozen=True)
class Design:
    """One way of dividing a model among parties.

    Attributes:
        name: as in the configuration.
        summary: one sentence for people.
        options: the model of its table in the configuration.
        join: makes the owner of a session: its first words with the others.
        roles: what each party runs.
        links: pairs of parties that talk; the first of a pair starts, and dials where the second is a service.
        data_plane: the link that carries tensors at every step, through shared memory where there is some.
        trainer: the party that runs the training engine.
        enclaves: roles that are enclaves.
        reveals: by observer and message kind, what the observer learns from what it receives.
        also_sees: by observer, what it learns that is no message (what it computes itself).
        exactness: the claim, in one sentence.
        is_exact: whether the claim is equality with `local` up to rounding, for given options.
        baseline: the options of `local` that train the same layers in the clear.
        methods: what it can train: LoRA factors, the blocks' own parameters.
        services: roles that can serve many sessions as one long-running process; each makes, once, what serves a link.
        by_session: roles that can be a service in another way: whenever the links of a session have come, ``roles`` is run.
    """

    name: str
    summary: str
    options: type[BaseModel]
    join: Callable[[Party], Owner]
    roles: Mapping[str, Callable[[Party], None]]
    links: tuple[tuple[str, str], ...]
    data_plane: tuple[str, str]
    trainer: str
    enclaves: frozenset[str]
    reveals: Mapping[str, Mapping[str, Reveal]]
    also_sees: Mapping[str, tuple[str, ...]]
    exactness: str
    is_exact: Callable[[BaseModel], bool]
    baseline: Mapping[str, str] = field(default_factory=dict)
    methods: frozenset[str] = frozenset({"lora"})
    services: Mapping[str, Callable[[Party], Callable[[Channel], None]]] = field(default_factory=dict)
    by_session: frozenset[str] = frozenset()

    @property
    def can_serve(self) -> tuple[str, ...]:
        """Roles that can run as services, by name."""
        return tuple(sorted({*self.services, *self.by_session}))

    def dials(self, role: str) -> tuple[str, ...]:
        """Whom a role links up with by itself: the first of a pair in ``links`` dials the second."""
        return tuple(b for a, b in self.links if a == role)

    def is_dialled_by(self, role: str) -> tuple[str, ...]:
        """Who links up with a role, which listens for them."""
        return tuple(a for a, b in self.links if b == role)

    @property
    def is_cut(self) -> bool:
        """Whether the model is cut, and the owner has layers of its own."""
        return self.trainer == "owner"

    @property
    def tunes_apart(self) -> bool:
        """Whether the owner tunes against an emulator of its own, so that by the table no state crosses meanwhile."""
        return "EmulatorShard" in self.reveals["owner"]

    def may_receive(self, observer: str) -> frozenset[str]:
        """Kinds of message this observer may get."""
        return frozenset(self.reveals[observer])


SAVE = Reveal("when a checkpoint is written", "control")
DONE = Reveal("the end of the session", "control")
ACK = Reveal("that a request was carried out", "control")

OPENED_SERVICE: Mapping[str, Reveal] = {
    "OpenSession": Reveal("what the session is for, its number and the run's; the seed of dropout", "control"),
    "Refused": Reveal("why a party that is a service ends the session", "control"),
    "StopSoon": Reveal("that a party that is a service is being stopped", "control"),
}
"""What crosses besides between parties that run as services, under designs with an enclave."""
RELEASED = Reveal("the adapter, where adapter.to says so", "clear")

OWNER_REVEALS: Mapping[str, Reveal] = {
    "Evidence": Reveal("what the enclave is", "public"),
    "ModelCard": Reveal("the architecture and the weights' fingerprint", "public"),
    "TokenizerFiles": Reveal("the tokenizer", "public"),
    "BatchLoss": Reveal("the loss of its own batch", "control"),
    "StepDone": Reveal("the gradient's norm", "control"),
    "Scores": Reveal("log-probabilities of its own continuations", "clear"),
    "Logits": Reveal("logits of its own tokens (verification only)", "clear"),
    "GeneratedToken": Reveal("the answer to its own prompt", "clear"),
    "AdapterTensors": RELEASED,
    "CostReport": Reveal("times and counts", "control"),
    "Acknowledged": ACK,
}
"""What the owner gets under every design whose engine is another party."""

PROVIDER_REVEALS: Mapping[str, Reveal] = {
    "Evidence": Reveal("what the enclave is", "public"),
    "Acknowledged": ACK,
    "Goodbye": DONE,
}

ATTESTED_PROVIDER_SEES: Mapping[str, Reveal] = {
    "SealedCopy": Reveal("which sealed copy of the weights the enclave has, if any", "public"),
    "AdapterTensors": RELEASED,
}
"""What the provider gets besides where an enclave trains."""

ENGINE_REVEALS: Mapping[str, Reveal] = {
    "ModelCard": Reveal("the architecture and the weights' fingerprint", "public"),
    "WeightShard": Reveal("the model's weights", "clear"),
    "TrainBatch": Reveal("the owner's training text, as token ids", "clear"),
    "EvalBatch": Reveal("the owner's held-out text, as token ids", "clear"),
    "ScoreBatch": Reveal("the owner's questions and options, as token ids", "clear"),
    "LogitsRequest": Reveal("the owner's tokens (verification only)", "clear"),
    "GenerateRequest": Reveal("the owner's prompt, as token ids", "clear"),
    "OptimizerStep": Reveal("the learning rate", "control"),
    "GradientsRequest": Reveal("that gradients are asked for (verification only)", "control"),
    "AdapterRequest": Reveal("that the adapter is asked for", "control"),
    "CostRequest": Reveal("that figures are asked for", "control"),
    "SaveState": SAVE,
    "LoadState": SAVE,
    "Goodbye": DONE,
}
"""What the party that runs the training engine gets from owner and provider."""

SPLIT_OWNER_REVEALS: Mapping[str, Reveal] = {
    "SplitAccepted": Reveal("that the provider agrees", "control"),
    "Refused": Reveal("why the provider does not", "control"),
    "ModelCard": Reveal("the architecture and the weights' fingerprint", "public"),
    "TokenizerFiles": Reveal("the tokenizer", "public"),
    "WeightShard": Reveal("embeddings, bottom and top layers, final norm and head, which the owner holds", "clear"),
    "TrunkOutput": Reveal("the trunk's output for its own states", "clear"),
    "Acknowledged": ACK,
}
"""What the owner gets where the model is cut."""

SPLIT_PROVIDER_REVEALS: Mapping[str, Reveal] = {
    "SplitRequest": Reveal("what the owner wants to agree on", "public"),
    "TrunkForward": Reveal(
        "the states at the bottom cut of every token of the owner's text that is sent, the padding, so the lengths of texts",
        "clear",
    ),
    "Forget": Reveal("the end of a pass or of a generation", "control"),
    "Acknowledged": ACK,
    "Goodbye": DONE,
}
"""What the provider gets where the model is cut."""

OWNER_SEES_GRADIENTS: Mapping[str, Reveal] = {"TrunkGradient": Reveal("the gradient of its own states", "clear")}
PROVIDER_SEES_GRADIENTS: Mapping[str, Reveal] = {
    "TrunkBackward": Reveal("the gradient of the loss in the trunk's output, at every step", "clear")
}
"""What crosses besides where the bottom is trained through the trunk."""

OWNER_SEES_EMULATOR: Mapping[str, Reveal] = {
    "EmulatorShard": Reveal("an emulator of the trunk, the owner's to keep", "clear")
}
PROVIDER_SEES_RESULT: Mapping[str, Reveal] = {
    "EmulatorRequest": Reveal("that the emulator is asked for", "control"),
    "PlugIn": Reveal("what the owner trained, if plug_in was agreed on", "clear"),
}
"""What crosses besides where an emulator is tuned against."""


HOST_SEES: Mapping[str, Reveal] = {
    "FactorsRequest": Reveal("that the factors are asked for", "control"),
    "FactorGradientsRequest": Reveal("that the factors' gradients are asked for", "control"),
    "OptimizerStep": Reveal("the learning rate, with optimizer_at = host", "control"),
    "SaveState": SAVE,
    "LoadState": SAVE,
    "Goodbye": DONE,
}
"""What the host of an enclave gets under every design, beside the trunk and its passes."""

ENCLAVE_SEES: Mapping[str, Reveal] = {
    **ENGINE_REVEALS,
    "ModelKey": Reveal("the key to the model's weights, where it has a sealed copy of them", "clear"),
    "HandOver": Reveal("that training is over, where the provider gets the adapter", "control"),
    "EvidenceRequest": Reveal("a nonce", "public"),
    "Factors": Reveal("the factors the host holds", "masked"),
    "FactorGradients": Reveal("the factors' gradients", "masked"),
    "Acknowledged": ACK,
}
"""What the enclave gets under every design, beside what comes back from passes."""


def _told(*names: str) -> dict[str, Reveal]:
    return {name: OPENED_SERVICE[name] for name in names}


def enclave_design(  # noqa: PLR0913 - keyword-only
    *,
    name: str,
    summary: str,
    options: type[BaseModel],
    enclave: Callable[[Party, ModelCard], EnclaveSession],
    host: Callable[[Party, TrunkPlan], HostSession],
    enclave_sees: Mapping[str, Reveal],
    host_sees: Mapping[str, Reveal],
    host_also_sees: tuple[str, ...],
    exactness: str,
    is_exact: Callable[[BaseModel], bool],
) -> Design:
    """A design in which an enclave trains with an untrusted host's help: what all of those have in common.

    Args:
        name: as for `Design`, like ``summary``, ``options``, ``exactness`` and ``is_exact``.
        summary: one sentence for people.
        options: the model of its table in the configuration.
        enclave: makes the enclave's session.
        host: makes the host's.
        enclave_sees: kinds of message that the enclave gets beside those of all such designs.
        host_sees: the same of the host.
        host_also_sees: what the host learns that is no message.
        exactness: the claim.
        is_exact: whether it is equality, for given options.
    """
    joined = partial(join, trainer="enclave", attested=True)
    return Design(
        name=name,
        summary=summary,
        options=options,
        join=joined,
        roles={
            "owner": partial(own, join=joined),
            "provider": partial(provide, trainer="enclave", attested=True),
            "enclave": partial(run_enclave, session=enclave),
            "host": partial(run_host, session=host),
        },
        links=(("owner", "provider"), ("owner", "enclave"), ("provider", "enclave"), ("enclave", "host")),
        data_plane=("enclave", "host"),
        trainer="enclave",
        enclaves=frozenset({"enclave"}),
        reveals={
            "owner": {**OWNER_REVEALS, **_told("Refused", "StopSoon")},
            "provider": {**PROVIDER_REVEALS, **ATTESTED_PROVIDER_SEES, **_told("OpenSession", "Refused")},
            "enclave": {**ENCLAVE_SEES, **_told("OpenSession", "Refused", "StopSoon"), **enclave_sees},
            "host": {**HOST_SEES, **_told("OpenSession"), **host_sees},
        },
        also_sees={"host": host_also_sees},
        exactness=exactness,
        is_exact=is_exact,
        by_session=frozenset({"provider", "enclave", "host"}),
    )


def cut_design(  # noqa: PLR0913 - keyword-only
    *,
    name: str,
    summary: str,
    options: type[BaseModel],
    plan: Planner,
    exactness: str,
    is_exact: Callable[[BaseModel], bool],
    layers: Literal["owner", "top"] = "owner",
    owner_sees: Mapping[str, Reveal] | None = None,
    provider_sees: Mapping[str, Reveal] | None = None,
) -> Design:
    """A design that cuts the model between two parties: what all of those have in common.

    Args:
        name: as for `Design`, like ``summary``, ``options``, ``exactness`` and ``is_exact``.
        summary: one sentence for people.
        options: the model of its table in the configuration.
        plan: makes its `SplitPlan` from its options.
        exactness: the claim.
        is_exact: whether it is equality, for given options.
        layers: which of its layers the owner trains.
        owner_sees: kinds of message that the owner gets beside those of all such designs.
        provider_sees: the same of the provider.
    """
    joined = partial(join_with_layers, planner=plan)
    return Design(
        name=name,
        summary=summary,
        options=options,
        join=joined,
        roles={"owner": partial(own, join=joined), "provider": partial(provide_trunk, planner=plan)},
        links=(("owner", "provider"),),
        data_plane=("owner", "provider"),
        trainer="owner",
        enclaves=frozenset(),
        reveals={
            "owner": {**SPLIT_OWNER_REVEALS, **(owner_sees or {})},
            "provider": {**SPLIT_PROVIDER_REVEALS, **(provider_sees or {})},
        },
        also_sees={"provider": ("the trunk, which is its own; bottom and top as they were before tuning",)},
        exactness=exactness,
        is_exact=is_exact,
        baseline={"layers": layers},
        methods=frozenset({"lora", "full"}),
        services={"provider": partial(open_trunk, planner=plan)},
    )
