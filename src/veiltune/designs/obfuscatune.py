"""`obfuscatune`: the enclave keeps the residual stream, the host multiplies masked states by masked weights.

*Reference.* ObfuscaTune (arXiv 2407.02960). ``placement = "paper"`` is its division; ``"compact"`` lets the host also run softmax
and activation, whose inputs it sees anyway: the same exposure, half the crossings.

*Reveals.* See ``OBFUSCATUNE.reveals``. In the clear to the host by the paper's own algebra: Q, K, V, the attention's output, the
MLP's pre-activations, the gradients of all these, and one factor of each LoRA pair.

*Bound.* Equal to `local` up to c·κ·eps (`privacy.orthogonal.error_bound`) with ``optimizer_at = "enclave"``, or with SGD.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from veiltune.checkpoints import StateStore, optimizer_tensors, restore_optimizer
from veiltune.config import Config, LoraConfig, Section, TrainConfig
from veiltune.designs.base import ACK, DONE, ENGINE_REVEALS, OWNER_REVEALS, PROVIDER_REVEALS, SAVE, Design, Reveal
from veiltune.engine import Backend, Engine, clip_and_step
from veiltune.errors import ProtocolError
from veiltune.models.adapters import (
    Keys,
    adapted_linears,
    initial_factors,
    mask_factors,
    unmask_factor_gradients,
    unmask_factors,
)
from veiltune.models.family import Family, Linear, Placement, find_family
from veiltune.models.precision import round_between_operations
from veiltune.models.remote import TrunkClient, install_stubs
from veiltune.models.skeleton import (
    assign_parameter,
    compute_dtype,
    config_from_json,
    empty_model,
    require_complete,
    resolve_device,
)
from veiltune.models.trunk import HostTrunk, make_optimizer
from veiltune.parties.owner import own
from veiltune.parties.party import Party
from veiltune.parties.provider import provide
from veiltune.privacy.orthogonal import KEY_KINDS, make_key
from veiltune.secrets import MasterSecret
from veiltune.tee.enclave import SimulatedEnclave
from veiltune.tee.sealing import SealingKey
from veiltune.transport.messages import (
    Acknowledged,
    CostReport,
    CostRequest,
    FactorGradients,
    FactorGradientsRequest,
    Factors,
    FactorsRequest,
    Forget,
    Goodbye,
    LoadState,
    Message,
    ModelCard,
    OptimizerStep,
    PassContext,
    SaveState,
    SegmentBackward,
    SegmentForward,
    SegmentGradient,
    SegmentOutput,
    StepDone,
    TrainBatch,
    TrunkPlan,
    TrunkShard,
    WeightShard,
)


class ObfuscaTuneOptions(Section):
    """The table ``[obfuscatune]``."""

    matrix: str = Field(default="orthogonal", description="kind of key: orthogonal, gaussian (naive), conditioned, butterfly")
    condition_number: float | None = Field(default=None, description="of matrix = 'conditioned'")
    placement: Placement = Field(default="compact", description="what the enclave computes: compact, or as in the paper")
    optimizer_at: Literal["host", "enclave"] = "enclave"
    key_seed: int | None = Field(default=None, description="reproducible keys, for tests only; unset: from the system's randomness")

    @model_validator(mode="after")
    def _check_matrix(self) -> ObfuscaTuneOptions:
        if self.matrix not in KEY_KINDS:
            raise ValueError(f"unknown kind of key (valid: {', '.join(sorted(KEY_KINDS))})")
        if (self.matrix == "conditioned") != (self.condition_number is not None):
            raise ValueError("condition_number belongs to matrix = 'conditioned', and to it alone")
        if self.condition_number is not None and self.condition_number < 1:
            raise ValueError("a condition number is at least 1")
        return self


# --- the host --------------------------------------------------------------------------------------------------------


class Host:
    """The host's session: one trunk, its factors, and possibly their optimiser."""

    def __init__(self, party: Party, plan: TrunkPlan) -> None:
        settings = plan.settings
        self.device = resolve_device(party.config.device)
        self.trunk = HostTrunk(
            config_from_json(plan.config),
            settings["placement"],
            LoraConfig.model_validate(settings["lora"]),
            self.device,
            rounded=settings["rounded"],
        )
        self.train = TrainConfig.model_validate(settings["train"]) if settings["optimizer_at"] == "host" else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: dict[str, nn.Parameter] = {}
        self.store = StateStore(party.directory, settings["fingerprint"])
        self._handlers: dict[type[Message], Any] = {
            SegmentForward: lambda m: SegmentOutput(self.trunk.forward(m)),
            SegmentBackward: lambda m: SegmentGradient(self.trunk.backward(m)),
            PassContext: self._context,
            Forget: self._forget,
            FactorGradientsRequest: self._gradients,
            Factors: self._take_factors,
            FactorsRequest: lambda _: Factors({name: value.detach() for name, value in self.parameters.items()}),
            OptimizerStep: self._step,
            SaveState: self._save,
            LoadState: self._load,
            TrunkShard: self._shard,
        }

    def handle(self, message: Message) -> Message | None:
        """Answer one message of the enclave; ``None`` where it wants no answer."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ProtocolError(f"the host does not answer {type(message).__name__}")
        return handler(message)

    def _shard(self, message: TrunkShard) -> Message:
        self.trunk.load(message.tensors)
        return Acknowledged()

    def _context(self, message: PassContext) -> None:
        self.trunk.set_context(message.context_id, message.attention_mask, message.cos, message.sin)

    def _forget(self, message: Forget) -> None:
        self.trunk.forget(message.cache_id)

    def _take_factors(self, message: Factors) -> Message:
        first = not self.parameters
        self.trunk.load_factors(message.tensors)
        if first:
            self.trunk.ready()
            self.parameters = self.trunk.parameters
            self.optimizer = None if self.train is None else make_optimizer(self.parameters, self.train)
        return Acknowledged()

    def _gradients(self, message: FactorGradientsRequest) -> Message:
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()}
        if message.clear:
            for parameter in self.parameters.values():
                parameter.grad = None
        return FactorGradients(found)

    def _step(self, message: OptimizerStep) -> Message:
        if self.optimizer is None:
            raise ProtocolError("this host has no optimiser: the agreed place for it is the enclave")
        return StepDone(clip_and_step(self.optimizer, self.parameters, message.learning_rate, message.max_grad_norm))

    def _save(self, message: SaveState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        self.store.save(message.step, optimizer_tensors(optimizer, self.parameters))
        return Acknowledged()

    def _load(self, message: LoadState) -> Message:
        optimizer = self.optimizer or torch.optim.SGD(list(self.parameters.values()))
        restore_optimizer(optimizer, self.parameters, self.store.load(message.step))
        return Acknowledged()


def run_host(party: Party) -> None:
    """The host: whatever the enclave asks, on masked numbers, until it says goodbye."""
    enclave = party.links["enclave"]
    host = Host(party, enclave.recv_as(TrunkPlan))
    enclave.send(Acknowledged())
    while True:
        message = enclave.recv()
        if isinstance(message, Goodbye):
            return
        answer = host.handle(message)
        if answer is not None:
            enclave.send(answer)


# --- the enclave -----------------------------------------------------------------------------------------------------


class ObfuscatedBackend(Backend):
    """Factors on the host in the obfuscated basis; the optimiser there, or here in the plain basis.

    Args:
        client: the enclave's end of the trunk.
        linears: the adapted linears.
        keys: every key of the trunk.
        secret: the master secret, which is all a sealed checkpoint must keep of the keys.
        store: sealed state.
        parameters: plain-basis factors if the optimiser is here, else empty.
        train: the optimiser's settings.
    """

    def __init__(
        self,
        client: TrunkClient,
        linears: list[Linear],
        keys: Keys,
        secret: MasterSecret,
        store: StateStore,
        parameters: dict[str, nn.Parameter],
        train: TrainConfig,
    ) -> None:
        self.client = client
        self.linears = linears
        self.keys = keys
        self.secret = secret
        self.store = store
        self.parameters = parameters
        self.optimizer = make_optimizer(parameters, train) if parameters else None

    def _ask(self, request: Message, answer: type[Any]) -> Any:
        start = time.perf_counter()
        self.client.channel.send(request)
        reply = self.client.channel.recv_as(answer)
        self.client.wait_seconds += time.perf_counter() - start
        return reply

    def push(self, factors: dict[str, Tensor]) -> None:
        """Send plain factors to the host, masked."""
        self._ask(Factors(mask_factors(factors, self.linears, self.keys)), Acknowledged)

    def _fetch_gradients(self, *, clear: bool) -> dict[str, Tensor]:
        masked = self._ask(FactorGradientsRequest(clear), FactorGradients).tensors
        return unmask_factor_gradients(masked, self.linears, self.keys)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `Backend.step`. With the optimiser on the host, the norm is that of the obfuscated gradients."""
        if self.optimizer is None:
            return self._ask(OptimizerStep(learning_rate, max_grad_norm), StepDone).grad_norm
        for name, gradient in self._fetch_gradients(clear=True).items():
            self.parameters[name].grad = gradient.to(self.parameters[name])
        norm = clip_and_step(self.optimizer, self.parameters, learning_rate, max_grad_norm)
        self.push({name: value.detach() for name, value in self.parameters.items()})
        return norm

    def gradients(self) -> dict[str, Tensor]:
        """See `Backend.gradients`."""
        return self._fetch_gradients(clear=False)

    def factors(self) -> dict[str, Tensor]:
        """See `Backend.factors`."""
        if self.optimizer is not None:
            return {name: value.detach() for name, value in self.parameters.items()}
        return unmask_factors(self._ask(FactorsRequest(), Factors).tensors, self.linears, self.keys)

    def save(self, step: int) -> None:
        """Seal the master secret and whatever is trained here; the host writes its masked share."""
        tensors = {"master": torch.frombuffer(bytearray(self.secret.reveal()), dtype=torch.uint8)}
        tensors["rng"] = torch.get_rng_state()
        if self.optimizer is not None:
            tensors |= optimizer_tensors(self.optimizer, self.parameters)
        self.store.save(step, tensors)
        self._ask(SaveState(step), Acknowledged)

    def load(self, step: int) -> None:
        """Undo `save`. The keys were derived from the sealed secret before the trunk was built."""
        tensors = self.store.load(step)
        torch.set_rng_state(tensors["rng"].to(torch.uint8))
        self._ask(LoadState(step), Acknowledged)
        if self.optimizer is not None:
            restore_optimizer(self.optimizer, self.parameters, tensors)
            self.push({name: value.detach() for name, value in self.parameters.items()})

    def end_of_pass(self) -> None:
        """The host may forget graphs and contexts."""
        self.client.forget()

    def end_of_generation(self) -> None:
        """The host may forget its caches."""
        self.client.forget_caches()


class Enclave:
    """The enclave's session: keys, the residual stream's half of the model, the training engine."""

    def __init__(self, party: Party, card: ModelCard) -> None:
        self.party = party
        self.card = card
        self.config: Config = party.config
        self.options: Any = party.options
        self.device = resolve_device(self.config.device)
        self.dtype, self.rounded = compute_dtype(self.config.dtype, self.device)
        if party.job.verb == "provision":  # nothing is computed: keep the checkpoint's own precision
            self.dtype, self.rounded = _stored_dtype(self.config.dtype), False
        self.model_config = config_from_json(card.config)
        self.family: Family = find_family(self.model_config)
        self.num_layers = int(self.model_config.num_hidden_layers)
        self.store = StateStore(party.directory, self.config.fingerprint(), SealingKey.load_or_create(party.directory))
        self.secret = self._master_secret()
        self.linears = list(self.family.linears(self.num_layers))
        self.keys = self._make_keys()
        self.client = TrunkClient(party.links["host"])
        self.model: Any = empty_model(self.model_config)
        self.adapted = adapted_linears(self.family, self.num_layers, self.config.lora)
        self.shapes = {linear.path: self._fan(linear.path) for linear in self.adapted}
        self.outputs = install_stubs(
            self.model, self.family, self.num_layers, self.options.placement, self.client, self.keys, rounded=self.rounded
        )

    def _master_secret(self) -> MasterSecret:
        if self.party.job.resume_step is not None:
            return MasterSecret(bytes(self.store.load(self.party.job.resume_step)["master"].tolist()))
        if self.options.key_seed is not None:
            return MasterSecret.for_tests(self.options.key_seed)
        return MasterSecret.generate()

    def _make_keys(self) -> Keys:
        labels = sorted({linear.key for linear in self.linears})
        dim = int(self.model_config.hidden_size)
        kind, condition = self.options.matrix, self.options.condition_number
        return {label: make_key(kind, dim, self.secret, label, condition) for label in labels}

    def _fan(self, path: str) -> tuple[int, int]:
        rows, columns = self.model.get_submodule(path).weight.shape
        return (rows, columns) if self.family.weights_in_out else (columns, rows)

    def provision(self) -> None:
        """Take the provider's stream: keep what is ours, mask what is the host's and pass it on, shard by shard."""
        provider, host = self.party.links["provider"], self.party.links["host"]
        settings = {
            "placement": self.options.placement,
            "optimizer_at": self.options.optimizer_at,
            "lora": self.config.lora.model_dump(mode="json", exclude={"init_seed"}),
            "train": self.config.train.model_dump(mode="json"),
            "rounded": self.rounded,
            "fingerprint": self.config.fingerprint(),
        }
        host.send(TrunkPlan(self.card.config, settings))
        host.recv_as(Acknowledged)
        while True:
            shard = provider.recv_as(WeightShard)
            masked = self._divide(shard.tensors)
            if masked:
                host.send(TrunkShard(masked))
                host.recv_as(Acknowledged)
            provider.send(Acknowledged())
            if shard.last:
                break
            del shard, masked
        self.model.tie_weights()
        require_complete(self.model)
        self.model.requires_grad_(requires_grad=False)
        if self.rounded:
            round_between_operations(self.model)

    def _divide(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masked tensors for the host; the others are put in their place here."""
        linears = {linear.path: linear for linear in self.linears}
        exposed = self._exposed_names()
        masked: dict[str, Tensor] = {}
        for name, stored in tensors.items():
            value = stored.to(self.dtype)
            path, _, leaf = name.rpartition(".")
            linear = linears.get(path)
            if linear is not None and leaf == "weight":
                masked[name] = self._mask_weight(linear, value)
            elif linear is not None and linear.side == "output":
                self.outputs[path].bias = nn.Parameter(value.to(self.device), requires_grad=False)
            elif linear is not None or name in exposed:
                masked[name] = value  # input-side biases act after the key cancels; QK-norm gains act on Q and K
            else:
                assign_parameter(self.model, name, value.to(self.device))
        return masked

    def _exposed_names(self) -> set[str]:
        if self.options.placement != "compact":
            return set()
        return {
            f"{self.family.blocks}.{block}.{path}.weight"
            for block in range(self.num_layers)
            for segment in self.family.segments
            for path in segment.exposed
        }

    def _mask_weight(self, linear: Linear, weight: Tensor) -> Tensor:
        row = weight if self.family.weights_in_out else weight.T
        key = self.keys[linear.key]
        masked = key.mask_input_weight(row) if linear.side == "input" else key.mask_output_weight(row)
        key.release()
        return (masked if self.family.weights_in_out else masked.T).contiguous()

    def engine(self) -> Engine:
        """The training engine over this model, with first factors on the host."""
        factors = initial_factors(self.shapes, self.config.lora, self.dtype)
        here = self.options.optimizer_at == "enclave"
        parameters = {name: nn.Parameter(value.to(self.device)) for name, value in factors.items()} if here else {}
        backend = ObfuscatedBackend(
            self.client, self.adapted, self.keys, self.secret, self.store, parameters, self.config.train
        )
        backend.push(factors)
        return Engine(self.model, backend, self.device, self.party.links["owner"].send)

    def serve(self) -> None:
        """Answer the owner until it is done, then let the host go."""
        engine = self.engine()
        held = sum(parameter.numel() for parameter in self.model.parameters())
        clock = _TrainingClock(self.party, self.client)
        self.party.report("ready")
        owner = self.party.links["owner"]
        while not isinstance(request := owner.recv(), Goodbye):
            if isinstance(request, CostRequest):
                owner.send(CostReport({"enclave_parameters": held, **clock.figures()}))
            else:
                owner.send(clock.timed(engine, request))
        self.party.links["host"].send(Goodbye())


def _stored_dtype(name: str) -> torch.dtype:
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}[name]


class _TrainingClock:
    """Seconds of training requests, those of them spent waiting for the host, and messages over the border."""

    def __init__(self, party: Party, client: TrunkClient) -> None:
        self._meter = party.meter
        self._client = client
        self.seconds = self.wait_seconds = 0.0
        self.crossings = self.steps = 0

    def _reading(self) -> tuple[float, float, int]:
        traffic = self._meter.snapshot()
        crossed = sum(
            counts["messages"] for pair, kinds in traffic.items() if "host" in pair for counts in kinds.values()
        )
        return time.perf_counter(), self._client.wait_seconds, crossed

    def timed(self, engine: Engine, request: Message) -> Message:
        """Have the engine answer, and add up what that took if it was part of a training step."""
        before = self._reading()
        answer = engine.handle(request)
        if isinstance(request, (TrainBatch, OptimizerStep)):
            now = self._reading()
            self.seconds += now[0] - before[0]
            self.wait_seconds += now[1] - before[1]
            self.crossings += now[2] - before[2]
            self.steps += isinstance(request, OptimizerStep)
        return answer

    def figures(self) -> dict[str, Any]:
        """Sums so far."""
        return {
            "engine_seconds": self.seconds,
            "wait_seconds": self.wait_seconds,
            "crossings_per_step": self.crossings / max(1, self.steps),
        }


def run_enclave(party: Party) -> None:
    """The enclave (simulated here): prove, take the model, mask and place it, serve the owner."""
    party.prove_enclave(SimulatedEnclave(party.config.fingerprint()), ("provider", "owner"))
    enclave = Enclave(party, party.links["provider"].recv_as(ModelCard))
    enclave.provision()
    enclave.serve()


# --- the table -------------------------------------------------------------------------------------------------------

HOST_REVEALS = {
    "TrunkPlan": Reveal("the architecture, the adapter's shape, placement and optimiser", "public"),
    "TrunkShard": Reveal(
        "R⁻¹·W of input-side and W·R of output-side linears; in the clear: input-side biases, and QK-norm gains when compact",
        "masked",
    ),
    "Factors": Reveal("A* = R⁻¹·A or B* = B·R of each LoRA pair; in the clear: the other factor of the pair", "masked"),
    "FactorsRequest": Reveal("that the factors are asked for", "control"),
    "FactorGradientsRequest": Reveal("that the factors' gradients are asked for", "control"),
    "PassContext": Reveal("the padding mask, so the lengths of texts, and rotary tables, so positions", "clear"),
    "SegmentForward": Reveal(
        "X·R of the normed states, whose norms and inner products are those of X; with placement = paper also, in the clear, "
        "the attention's output and the MLP's activations",
        "masked",
    ),
    "SegmentBackward": Reveal(
        "dO·R⁻ᵀ of the segments' outputs; with placement = paper also, in the clear, gradients of Q, K, V and pre-activations",
        "masked",
    ),
    "OptimizerStep": Reveal("the learning rate, with optimizer_at = host", "control"),
    "Forget": Reveal("the end of a pass", "control"),
    "SaveState": SAVE,
    "LoadState": SAVE,
    "Acknowledged": ACK,
    "Goodbye": DONE,
}


def _exact(options: BaseModel) -> bool:
    return getattr(options, "matrix", "") != "gaussian"


OBFUSCATUNE = Design(
    name="obfuscatune",
    summary="a small enclave keeps embeddings, norms and head; the host computes on masked states and weights",
    options=ObfuscaTuneOptions,
    roles={
        "owner": partial(own, trainer="enclave", attested=True),
        "provider": partial(provide, trainer="enclave", attested=True),
        "enclave": run_enclave,
        "host": run_host,
    },
    links=(("owner", "provider"), ("owner", "enclave"), ("provider", "enclave"), ("enclave", "host")),
    data_plane=("enclave", "host"),
    trainer="enclave",
    enclaves=frozenset({"enclave"}),
    reveals={
        "owner": OWNER_REVEALS,
        "provider": PROVIDER_REVEALS,
        "enclave": {
            **ENGINE_REVEALS,
            "EvidenceRequest": Reveal("a nonce", "public"),
            "SegmentOutput": Reveal("the host's products", "masked"),
            "SegmentGradient": Reveal("the host's gradients", "masked"),
            "Factors": Reveal("the factors the host holds", "masked"),
            "FactorGradients": Reveal("the factors' gradients", "masked"),
            "StepDone": Reveal("the gradient's norm, with optimizer_at = host", "control"),
            "Acknowledged": ACK,
        },
        "host": HOST_REVEALS,
    },
    also_sees={
        "host": (
            "Q, K and V of every token and head, in the clear: the key cancels in X*·W*",
            "the attention's output and the MLP's pre-activations and activations, in the clear",
            "the gradients of all these, in the clear",
            "of each LoRA pair the factor that meets no key, and its gradient, in the clear",
        ),
    },
    exactness="equal to local up to c·κ·eps with optimizer_at = enclave or SGD; AdamW on the host is equal in distribution",
    is_exact=_exact,
)
