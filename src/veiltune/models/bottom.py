"""The bottom: the first layers of a model as a function from tokens to the states at a cut.

The model is left whole. A hook on the first block above the cut takes the states and stops the pass there.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune.models.families import find_family
from veiltune.models.skeleton import blocks_of


class _Reached(Exception):  # noqa: N818 - no error: the pass has come to the cut
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class Bottom:
    """The first ``layers`` slots of a causal language model with its embeddings; what is above them need not be there.

    Args:
        model: of `transformers`; not changed.
        layers: blocks below the cut; fewer than the model has.
    """

    def __init__(self, model: Any, layers: int) -> None:
        self.model = model
        self.layers = layers
        self.family = find_family(self.model.config)
        self.has_positions = self.family.positions is not None
        self.width = int(self.model.config.hidden_size)
        self.vocab_size = int(self.model.get_input_embeddings().weight.shape[0])
        self._decoder: Any = model.get_submodule(self.family.decoder)
        blocks = blocks_of(model, self.family)
        self._first, self._next = blocks[0], blocks[layers]

    def states(
        self,
        ids: Int[Tensor, "batch seq"],
        attention_mask: Tensor | None = None,
        *,
        position_ids: Int[Tensor, "rows seq"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch seq d"]:
        """States at the cut of these tokens; with a cache, of tokens that follow those in it."""
        with self._stopping():
            try:
                self._decoder(
                    input_ids=ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
            except _Reached as reached:
                return reached.states
        raise AssertionError("the pass ended below the cut")

    def from_embeddings(self, embeddings: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch seq d"]:
        """States at the cut of embeddings that need not be any token's; differentiable."""
        with self._stopping():
            try:
                self._decoder(inputs_embeds=embeddings, use_cache=False)
            except _Reached as reached:
                return reached.states
        raise AssertionError("the pass ended below the cut")

    def first_norm(self, raw: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """What the first block's attention reads of states that enter it."""
        return self._first.get_submodule(self.family.attention.norm)(raw)

    @contextmanager
    def _stopping(self) -> Generator[None]:
        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = self._next.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
