"""Who holds which parameter under a design, and what share of parameters and arithmetic falls to the enclave.

Everything here comes from a configuration alone: no weight is made, loaded or moved.

*Reference.* The shares of ObfuscaTune (arXiv 2407.02960), which says "about 5%": computed from the published shapes,
GPT-2 small has 31.7% of its parameters in the enclave, medium 14.8%, large 8.5% and XL 5.3%. So it is a figure of large
models, and one of parameters: the enclave's share of arithmetic is larger (see *Maskings*).

*What is counted.*

- Parameters: every parameter of the plain model once; a head tied to the embedding is no second tensor. Adapters and
  keys are not the model's, so they stand apart (``lora_parameters_per_rank``, ``key_elements``).
- FLOPs: matrix products of one forward pass over ``batch`` sequences of ``length`` tokens, without padding or cache; a
  product (m, k)·(k, n) is 2·m·k·n. The head is counted at every position, though a training step needs the labelled
  ones alone. Q·Kᵀ and the product with V are counted as full squares, masked scores included. Elementwise work (norms,
  softmax, activation, rotary embedding, residual additions), the look-up of embeddings and the adapters' products are
  not counted: they are of lower order in the width.
- Maskings: a dense key of width d costs 2·d² per token and side, so 8·d² a block: four of them, in and out of each
  segment. This is arithmetic the plain model does not have; it is in the enclave's FLOPs and in the total. Against the
  24·d² of a GPT-2 block it is a third, which no growth of the model makes smaller. A structured key costs less.
- A backward pass through frozen weights costs every product once more (attention's twice), so the shares of a training
  step are near these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from veiltune.errors import UserError, nearest
from veiltune.models.families import find_family
from veiltune.models.family import Family, Linear, Placement
from veiltune.models.skeleton import empty_model

Design = Literal["local", "obfuscatune", "veil"]
Holder = Literal["enclave", "host", "owner", "provider"]

DESIGNS: tuple[Design, ...] = ("local", "obfuscatune")
"""Designs that are accounted for here; `veil` is in `models.veil_accounting`."""

_SEGMENT_TITLES = {"attention": "attention", "mlp": "MLP"}


@dataclass(frozen=True)
class TensorPlace:
    """One parameter of the plain model and the party that holds it.

    Attributes:
        name: its name in the plain model.
        shape: its shape there.
        num_parameters: its number of elements.
        holder: who holds it while training.
        is_masked: it is under a key there, so its holder does not have the plain model's numbers.
        kind: what it is, the same for all blocks: "attention input weights", "norms", "token embedding" …
    """

    name: str
    shape: tuple[int, ...]
    num_parameters: int
    holder: Holder
    is_masked: bool
    kind: str


@dataclass(frozen=True)
class Shares:
    """The enclave's part of a model and of one forward pass. See the module for what is counted.

    Attributes:
        design: which design.
        placement: which placement of it, if it has any.
        batch: sequences in the pass.
        length: tokens a sequence.
        num_parameters: of the plain model.
        enclave_parameters: those of them that the enclave holds.
        clear_parameters: those that the host holds in the clear: input-side biases, which no key touches, and QK-norm
            gains.
        linear_flops: the trunk's linears.
        attention_flops: Q·Kᵀ and the product with V.
        head_flops: the head.
        mask_flops: masking and unmasking under dense keys; 0 without a masking design.
        enclave_flops: what of the four falls to the enclave.
        key_elements: numbers in the enclave's keys, one dense matrix for each side of each segment (an orthogonal key's
            inverse is its transpose; other dense keys keep their inverse too, which doubles this).
        lora_parameters_per_rank: numbers in the LoRA factors of every linear at rank 1, which are the host's (under `veil`
            those of its trunk).
        crossings: messages with hidden states over the enclave's border, both ways together.
    """

    design: Design
    placement: Placement | None
    batch: int
    length: int
    num_parameters: int
    enclave_parameters: int
    clear_parameters: int
    linear_flops: int
    attention_flops: int
    head_flops: int
    mask_flops: int
    enclave_flops: int
    key_elements: int
    lora_parameters_per_rank: int
    crossings: int

    @property
    def param_share(self) -> float:
        """Share of the model's parameters in the enclave, from 0 to 1."""
        return self.enclave_parameters / self.num_parameters

    @property
    def revealed_param_share(self) -> float:
        """Share of the model's parameters that the host sees in the clear, from 0 to 1."""
        return self.clear_parameters / self.num_parameters

    @property
    def flops(self) -> int:
        """Forward FLOPs of all parties."""
        return self.linear_flops + self.attention_flops + self.head_flops + self.mask_flops

    @property
    def flop_share(self) -> float:
        """Share of the forward FLOPs in the enclave, from 0 to 1."""
        return self.enclave_flops / self.flops

    def lora_parameters(self, rank: int) -> int:
        """Numbers in the LoRA factors of every linear: rank · Σ (in + out)."""
        return rank * self.lora_parameters_per_rank


def tensor_placement(config: Any, placement: Placement, design: Design | str) -> list[TensorPlace]:
    """Every parameter of the plain model, in the model's order, and who holds it.

    Under `local` all are the host's. Under `obfuscatune` the host holds the weights of the trunk's linears, the biases
    of the input side and, if ``placement`` is ``compact``, the parameters between them (QK-norm gains); the enclave
    holds the rest.

    Args:
        config: a `transformers` configuration.
        placement: of `obfuscatune`.
        design: one of `DESIGNS`.

    Raises:
        UserError: an unknown design or placement.
        ModelError: no family covers the configuration.
    """
    _check(design, placement)
    return _places(empty_model(config), config, placement, design)


def lora_parameters(config: Any, rank: int) -> int:
    """Numbers in the LoRA factors of every linear at a rank: rank · Σ (in + out).

    Raises:
        ModelError: no family covers the configuration.
    """
    return rank * sum(sum(shape) for _, shape in linear_shapes(empty_model(config), config))


def shares(
    config: Any, placement: Placement, batch: int, length: int, *, design: Design | str = "obfuscatune"
) -> Shares:
    """The enclave's share of parameters and of forward FLOPs.

    Args:
        config: a `transformers` configuration.
        placement: ``paper`` (attention's products are the enclave's) or ``compact`` (they are the host's).
        batch: sequences in the pass.
        length: tokens a sequence.
        design: one of `DESIGNS`; `local` has no enclave, so its shares are 0.

    Raises:
        UserError: an unknown design or placement, or a batch or length below 1.
        ModelError: no family covers the configuration.
    """
    _check(design, placement)
    if batch < 1 or length < 1:
        raise UserError(
            f"cannot count a pass over {batch} x {length} tokens", hint="give a batch and a length of at least 1"
        )
    model: Any = empty_model(config)
    family, layers, protected = find_family(config), config.num_hidden_layers, design == "obfuscatune"
    places = _places(model, config, placement, design)
    clear = [place for place in places if place.holder == "host" and not place.is_masked]
    linears = linear_shapes(model, config)
    tokens = batch * length
    linear_flops = 2 * tokens * sum(math.prod(shape) for _, shape in linears)
    attention_flops = 4 * batch * length**2 * attention_widths(family, linears)
    head_flops = 2 * tokens * int(model.get_output_embeddings().weight.numel())
    key_elements = sum(_key_elements(linears).values()) if protected else 0
    mask_flops = 2 * tokens * key_elements
    enclave_flops = head_flops + mask_flops + (attention_flops if placement == "paper" else 0)
    return Shares(
        design="obfuscatune" if protected else "local",
        placement=placement,
        batch=batch,
        length=length,
        num_parameters=sum(place.num_parameters for place in places),
        enclave_parameters=sum(place.num_parameters for place in places if place.holder == "enclave"),
        clear_parameters=sum(place.num_parameters for place in clear),
        linear_flops=linear_flops,
        attention_flops=attention_flops,
        head_flops=head_flops,
        mask_flops=mask_flops,
        enclave_flops=enclave_flops if protected else 0,
        key_elements=key_elements,
        lora_parameters_per_rank=sum(sum(shape) for _, shape in linears),
        crossings=2 * len(family.operations(layers, placement)) if protected else 0,
    )


def _check(design: str, placement: str) -> None:
    if design not in DESIGNS:
        raise UserError(f"no account of the design {design!r}", hint=nearest(design, DESIGNS))
    if placement not in {"paper", "compact"}:
        raise UserError(f"unknown placement {placement!r}", hint=nearest(placement, ["paper", "compact"]))


def _places(model: Any, config: Any, placement: Placement, design: str) -> list[TensorPlace]:
    family, layers = find_family(config), config.num_hidden_layers
    kinds = kinds_of(model, config)
    masked = {f"{linear.path}.weight" for linear in family.linears(layers)} if design == "obfuscatune" else set()
    clear = _clear(family, layers, placement)
    places: list[TensorPlace] = []
    for name, value in stored_parameters(model):
        on_host = design == "local" or name in masked or name in clear
        holder: Holder = "host" if on_host else "enclave"
        kind = kinds.get(name, "other")
        places.append(TensorPlace(name, tuple(value.shape), value.numel(), holder, name in masked, kind))
    return places


def stored_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Every stored parameter once; a tied one under the name it is tied to."""
    for name, value in model.named_parameters(remove_duplicate=False):
        if name not in model.all_tied_weights_keys:
            yield name, value


def _clear(family: Family, num_layers: int, placement: Placement) -> set[str]:
    """Names of what `obfuscatune`'s host holds as it is (names that a model lacks do no harm)."""
    clear = {f"{linear.path}.bias" for linear in family.linears(num_layers) if linear.side == "input"}
    if placement == "compact":
        clear |= {f"{path}.weight" for _, path in family.exposed(num_layers)}
    return clear


def kinds_of(model: Any, config: Any) -> dict[str, str]:
    """What each parameter is, by name. Names that are tied to another are there too."""
    family, layers = find_family(config), config.num_hidden_layers
    kinds: dict[str, str] = {}
    for path, module in model.named_modules():
        for leaf, value in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding):
                kinds[f"{path}.{leaf}"] = "position embedding"
            elif value.dim() == 1:
                kinds[f"{path}.{leaf}"] = "norms"
    for linear in family.linears(layers):
        title = _SEGMENT_TITLES[linear.key.split(".")[1]]
        kinds[f"{linear.path}.weight"] = f"{title} {linear.side} weights"
        kinds[f"{linear.path}.bias"] = f"{title} {linear.side} biases"
    for segment, path in family.exposed(layers):
        kinds[f"{path}.weight"] = f"{_SEGMENT_TITLES[segment.name]} inner norms"
    names = {id(module): path for path, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    is_tied = f"{head}.weight" in model.all_tied_weights_keys
    kinds[f"{head}.weight"] = "head"
    kinds[f"{embedding}.weight"] = "token embedding, also the head" if is_tied else "token embedding"
    return kinds


def linear_shapes(model: nn.Module, config: Any) -> list[tuple[Linear, tuple[int, int]]]:
    """Every linear of the trunk with its (in, out)."""
    family = find_family(config)
    found: list[tuple[Linear, tuple[int, int]]] = []
    for linear in family.linears(config.num_hidden_layers):
        weight: Any = model.get_submodule(linear.path).weight
        found.append((linear, family.fan(weight)))
    return found


def attention_widths(family: Family, linears: list[tuple[Linear, tuple[int, int]]]) -> int:
    """Sum over blocks of heads · head width: what each attention hands to its output linear."""
    ending = f".{family.attention.output}"
    return sum(fan_in for linear, (fan_in, _) in linears if linear.path.endswith(ending))


def _key_elements(linears: list[tuple[Linear, tuple[int, int]]]) -> dict[str, int]:
    """Elements of each dense key, by its label: the square of the width of the side it masks."""
    return {linear.key: (shape[0] if linear.side == "input" else shape[1]) ** 2 for linear, shape in linears}
