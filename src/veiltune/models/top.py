"""The top: the last layers of a model, final norm included, as a function from the trunk's output to what the head reads.

It shares its parameters with the model it is made of, which is left as it is.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from veiltune.models.cut import Cut, NoPositions, owner_model
from veiltune.models.families import find_family
from veiltune.models.skeleton import assign_parameter, keep_modules


class Top:
    """The last ``layers`` blocks of a causal language model, its final norm and its head.

    Args:
        model: of `transformers`; not changed.
        layers: blocks above the upper cut.
    """

    def __init__(self, model: Any, layers: int) -> None:
        config = model.config
        family = find_family(config)
        cut = Cut(0, layers, int(config.num_hidden_layers))
        shell = owner_model(config, cut)
        decoder: Any = shell.get_submodule(family.decoder)
        if family.positions is not None:
            setattr(decoder, family.positions, NoPositions())
        if family.embedding_dropout is not None:
            setattr(decoder, family.embedding_dropout, nn.Identity())
        wanted = {f"{family.decoder}.{family.final_norm}", *(f"{family.blocks}.{index}" for index in cut.top)}
        keep_modules(shell, wanted)
        for name, _ in list(shell.named_parameters()):
            assign_parameter(shell, name, model.get_parameter(name).detach())
        self.layers = layers
        self.head: nn.Module = model.get_output_embeddings()
        self._decoder = decoder

    def head_inputs(self, states: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        """What the head reads, of states that leave the trunk (right-padded, if at all); differentiable."""
        return self._decoder(inputs_embeds=states, use_cache=False).last_hidden_state
