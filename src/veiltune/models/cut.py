"""A model cut in three: bottom (embeddings and first blocks), trunk, and top (last blocks, final norm, head).

The data owner holds bottom and top, the model provider the trunk. Both sides keep the model `transformers` builds, with every
block slot at its index, and leave in the slots of the other side a module that hands hidden states on::

    owner      embed ── 0 ── 1 ── [stub] ─ [ ] ─ [ ] ── 5 ── norm ── head
                                    │                ▲
    provider           [ ]  [ ] ─── 2 ──── 3 ── 4 ── [ ]

So positions, masks, sliding windows and KV caches stay `transformers`' own and fall right on both sides: a slot that hands on
still counts its positions in the cache, from which masks and positions are made. The owner's way to the trunk is
`models.trunk_stub`.

*Reference.* Split learning (arXiv 1812.00564, U-shaped without label sharing) and offsite tuning (arXiv 2302.04870).

*Exactness.* Rejoined, the cut model runs the plain model's operations in the same order. The one exception is training with
layer drop (some OPT configurations), which is left out on both sides: a dropped stub would drop the whole trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from veiltune.errors import ConfigError, ProtocolError
from veiltune.models.families import find_family
from veiltune.models.family import Family
from veiltune.models.skeleton import blocks_of, empty_model, keep_modules

Side = Literal["owner", "trunk"]


@dataclass(frozen=True)
class Cut:
    """Where a model of ``num_layers`` blocks is cut: that many first and last blocks are the owner's.

    Build it by `Cut.of`, which checks that a trunk of at least one block remains.
    """

    bottom_layers: int
    top_layers: int
    num_layers: int

    @classmethod
    def of(cls, config: Any, bottom_layers: int, top_layers: int) -> Cut:
        """The cut of a model with this `transformers` configuration.

        Raises:
            ConfigError: a depth is negative, or no block is left for the trunk.
        """
        num_layers = int(config.num_hidden_layers)
        most = num_layers - 1
        for name, value in (("bottom_layers", bottom_layers), ("top_layers", top_layers)):
            if not 0 <= value <= most:
                raise ConfigError(
                    f"cut.{name} = {value} does not fit a model of {num_layers} blocks",
                    hint=f"0 to {most} are possible, so that at least one block is the trunk's",
                )
        if bottom_layers + top_layers > most:
            raise ConfigError(
                f"cut.bottom_layers = {bottom_layers} and cut.top_layers = {top_layers} leave no trunk in a model of "
                f"{num_layers} blocks",
                hint=f"their sum may be at most {most}",
            )
        return cls(bottom_layers, top_layers, num_layers)

    @property
    def bottom(self) -> tuple[int, ...]:
        """Indices of the owner's first blocks."""
        return tuple(range(self.bottom_layers))

    @property
    def trunk(self) -> range:
        """Indices of the provider's blocks; never empty."""
        return range(self.bottom_layers, self.num_layers - self.top_layers)

    @property
    def top(self) -> tuple[int, ...]:
        """Indices of the owner's last blocks."""
        return tuple(range(self.num_layers - self.top_layers, self.num_layers))

    @property
    def owner_layers(self) -> tuple[int, ...]:
        """Indices of the owner's blocks, bottom and top."""
        return self.bottom + self.top

    def holds(self, family: Family, name: str) -> Side:
        """Whose a parameter (or module) of the causal language model is, by its name: the trunk's iff it is in a trunk block."""
        prefix = f"{family.blocks}."
        index = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        return "trunk" if index.isdecimal() and int(index) in self.trunk else "owner"


class PassThrough(nn.Module):
    """Stands in the slot of a block that another party holds: hands states on, and counts their positions in the cache.

    The length of a cache is asked of its first layer, or of the first of its kind where some layers have a sliding window; any
    slot can be that layer.
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq d"],
        *args: Any,
        past_key_values: Any = None,
        **_: Any,
    ) -> Float[Tensor, "batch seq d"]:
        """As a block of `transformers`."""
        cache = cache_argument(args, past_key_values)
        if cache is not None:
            count_positions(cache, self.index, hidden_states)
        return hidden_states


def cache_argument(args: Sequence[Any], past_key_values: Any) -> Any:
    """The KV cache among a block's arguments: by keyword, or, as GPT-2 passes it, first after the hidden states."""
    return past_key_values if past_key_values is not None or not args else args[0]


def count_positions(cache: Any, index: int, hidden: Float[Tensor, "batch seq d"]) -> None:
    """Lengthen layer ``index`` of a cache by these positions. In the place of keys it holds the row's number, one a position.

    (A layer of width 0 would not count: its length is taken for 0.)
    """
    batch, seq, _ = hidden.shape
    rows = torch.arange(batch, dtype=torch.float32, device=hidden.device)
    counter = rows.view(batch, 1, 1, 1).expand(batch, 1, seq, 1)
    cache.update(counter, counter, index)


class NoPositions(nn.Module):
    """Stands in the place of a learned position embedding whose output is in the states already: a zero that broadcasts."""

    def forward(self, *_: Any, **__: Any) -> Float[Tensor, ""]:
        """A scalar, which takes the dtype and the device of what it is added to."""
        return torch.zeros(())


def owner_model(config: Any, cut: Cut) -> nn.Module:
    """The owner's half of a causal language model, on the meta device, its parameters called as in the plain model.

    Its parameters are to be assigned (`models.skeleton`), then ``tie_weights()`` called, which ties the head to the embedding
    where the configuration does: the owner holds one copy. The trunk's slots only hand on: see `install_trunk_stub`.
    """
    return _with_empty_slots(config, cut, tuple(cut.trunk))


def trunk_model(config: Any, cut: Cut) -> nn.Module:
    """The provider's half, on the meta device: nothing but the trunk's blocks has parameters or an effect on hidden states."""
    family = find_family(config)
    model = _with_empty_slots(config, cut, cut.owner_layers)
    decoder = model.get_submodule(family.decoder)
    setattr(decoder, family.final_norm, nn.Identity())
    if family.positions is not None:
        setattr(decoder, family.positions, NoPositions())
    if family.embedding_dropout is not None:
        setattr(decoder, family.embedding_dropout, nn.Identity())
    keep_modules(model, {f"{family.blocks}.{index}" for index in cut.trunk})
    return model


def _with_empty_slots(config: Any, cut: Cut, empty: Sequence[int]) -> nn.Module:
    family = find_family(config)
    model = empty_model(config)
    if len(blocks_of(model, family)) != cut.num_layers:
        raise ConfigError(
            f"the cut is of a model of {cut.num_layers} blocks, this one has {config.num_hidden_layers}",
            hint="make the cut from the configuration of this model",
        )
    empty_slots(model, family, empty)
    return model


def empty_slots(model: nn.Module, family: Family, indices: Sequence[int]) -> None:
    """Leave blocks out of a model: what enters these slots goes on to the next. No path of the others changes."""
    slots = model.get_submodule(family.blocks)
    for index in indices:
        setattr(slots, str(index), PassThrough(index))
    decoder: Any = model.get_submodule(family.decoder)
    if hasattr(decoder, "layerdrop"):
        decoder.layerdrop = 0.0


class Trunk:
    """The provider's trunk as a function of hidden states, stateless but for the caches it is handed.

    Args:
        model: a `trunk_model` whose parameters have been assigned.
        config: its `transformers` configuration.
        cut: where it was cut.

    *Reveals.* To the provider: the owner's hidden states, the padding, and positions that do not simply count.
    """

    def __init__(self, model: nn.Module, config: Any, cut: Cut) -> None:
        self.model = model
        self.config = config
        self.cut = cut
        self._decoder: Any = model.get_submodule(find_family(config).decoder)

    def new_cache(self) -> Any:
        """An empty KV cache with a layer for every slot, sliding windows included."""
        from transformers import DynamicCache

        return DynamicCache(config=self.config)

    def forward(
        self,
        hidden: Tensor,
        context_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        *,
        training: bool,
    ) -> Float[Tensor, "batch seq d"]:
        """The trunk's output, under the caller's gradient mode; the positions are added to ``cache`` if there is one.

        Args:
            hidden: states at the bottom cut, (batch, seq, d), of the parameters' dtype.
            context_mask: of padding, (batch, past + seq), bool or integers; ``None`` if nothing is padded.
            position_ids: (1 or batch, seq), integers; ``None`` if they count on from the cache's length.
            cache: from `new_cache`, or ``None``.
            training: whether dropout acts.

        Raises:
            ProtocolError: shapes or dtypes that do not fit one another, the model or the cache.
        """
        self._check(hidden, context_mask, position_ids, cache)
        if self._decoder.training != training:
            self._decoder.train(training)
        output = self._decoder(
            inputs_embeds=hidden,
            attention_mask=None if context_mask is None else context_mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state

    def _check(self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Any) -> None:
        """What comes from another party is checked here, before `transformers` broadcasts it into something else."""
        dtype = next(self._decoder.parameters()).dtype
        width = self.config.hidden_size
        if hidden.dim() != 3 or hidden.shape[2] != width or 0 in hidden.shape or hidden.dtype != dtype:
            raise ProtocolError(
                f"hidden states of shape {tuple(hidden.shape)} and {hidden.dtype}; the trunk takes (batch, seq, {width}) "
                f"of {dtype}"
            )
        batch, seq, _ = hidden.shape
        past = 0 if cache is None else cache.get_seq_length()
        if past and (held := cache.layers[self.cut.trunk.start].keys.shape[0]) != batch:
            raise ProtocolError(f"a batch of {batch} rows cannot continue a cache of {held}")
        if mask is not None and mask.shape != (batch, past + seq):
            raise ProtocolError(f"a padding mask of shape {tuple(mask.shape)} does not cover {(batch, past + seq)}")
        if position_ids is not None and (position_ids.shape not in {(1, seq), (batch, seq)} or _inexact(position_ids)):
            raise ProtocolError(
                f"position ids of shape {tuple(position_ids.shape)} and {position_ids.dtype} do not fit {(batch, seq)}"
            )


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
