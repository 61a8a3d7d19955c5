"""What a model family is to Veiltune: where its blocks are, and which linears read or write the residual stream.

A pre-norm block is two *segments*, attention and MLP. In each, the *input side* linears read the normed residual state and
the *output side* linear writes back to it::

    h ──norm──► inputs ──(attention | activation)──► output ──► + ──► h

Everything else (embeddings, norms, residual additions, head, the bias of the output side) stays with whoever holds the
residual stream. A family is one module in `models.families` and one line in its table; the code that cuts, masks, counts and
rejoins models reads nothing but the description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Placement = Literal["paper", "compact"]


class PretrainedConfig(Protocol):
    """The part of a `transformers` configuration that is read here."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int


@dataclass(frozen=True)
class Segment:
    """One half of a block.

    Attributes:
        name: ``attention`` or ``mlp``.
        module: path of the submodule that computes the segment, inside the block; ``None`` if the block computes it inline.
        inputs: paths of the input-side linears, inside the block. They share one key.
        output: path of the output-side linear, inside the block.
        dropout: path of a dropout that acts on the output, if it lies inside the segment's module.
        exposed: other parameters inside the segment's module, which go where the module goes (QK-norm gains).
        norm: path of the norm before the input side, inside the block.
        post_norm: path of a norm that acts on what the segment adds to the residual stream (Gemma's sandwich), if there is one.
    """

    name: Literal["attention", "mlp"]
    module: str | None
    inputs: tuple[str, ...]
    output: str
    dropout: str | None = None
    exposed: tuple[str, ...] = ()
    norm: str = ""
    post_norm: str | None = None


def _supported(_: PretrainedConfig) -> str | None:
    return None


def _call_mlp(block: Any, hidden: Tensor) -> Tensor:
    return block.mlp(hidden)


def _replace_mlp(block: Any, stub: nn.Module) -> None:
    block.mlp = stub


@dataclass(frozen=True)
class Family:
    """A family of architectures that are cut alike.

    Attributes:
        name: what users and error messages call it.
        model_types: the ``model_type`` of every `transformers` configuration it covers.
        blocks: dotted path of the list of blocks in the causal language model.
        attention: the first segment of a block.
        mlp: the second segment of a block.
        final_norm: name of the norm after the last block, beside the list of blocks.
        positions: name of the learned position embedding, beside the blocks; ``None`` if positions are rotary.
        embedding_dropout: name of the dropout before the first block, beside the blocks.
        weights_in_out: linears store their weight as (in, out), `Conv1D`'s way, not (out, in).
        gain_offset: what an RMSNorm adds to its stored weight to make its gain.
        residual_dropout: name in the configuration of the dropout of what is added to the residual stream, if there is one.
        call_mlp: runs the MLP segment of a block on hidden states.
        replace_mlp: puts a stub in the place of a block's MLP segment.
        refuses: says why a configuration of this family is not supported, or ``None``.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    attention: Segment
    mlp: Segment
    final_norm: str
    positions: str | None = None
    embedding_dropout: str | None = None
    weights_in_out: bool = False
    gain_offset: float = 0.0
    residual_dropout: str | None = None
    call_mlp: Callable[[Any, Tensor], Tensor] = _call_mlp
    replace_mlp: Callable[[Any, nn.Module], None] = _replace_mlp
    refuses: Callable[[PretrainedConfig], str | None] = _supported

    @property
    def decoder(self) -> str:
        """Path of the module whose forward runs the blocks: embeddings, positions, masks, blocks, final norm."""
        return self.blocks.rpartition(".")[0]

    def fan(self, weight: Tensor) -> tuple[int, int]:
        """(in, out) of a linear, from its weight as it is stored."""
        rows, columns = weight.shape
        return (rows, columns) if self.weights_in_out else (columns, rows)

    @property
    def segments(self) -> tuple[Segment, Segment]:
        """Both segments in the order they run."""
        return (self.attention, self.mlp)

    def linears(self, num_layers: int) -> Iterator[Linear]:
        """Every linear of the trunk, block by block."""
        for block in range(num_layers):
            for segment in self.segments:
                key = f"block{block}.{segment.name}"
                for path in segment.inputs:
                    yield Linear(f"{self.blocks}.{block}.{path}", "input", f"{key}.in", block)
                yield Linear(f"{self.blocks}.{block}.{segment.output}", "output", f"{key}.out", block)

    def exposed(self, num_layers: int) -> Iterator[tuple[Segment, str]]:
        """Paths of the other modules with parameters inside segments (QK-norms), with the segment each is in."""
        for block in range(num_layers):
            for segment in self.segments:
                for path in segment.exposed:
                    yield segment, f"{self.blocks}.{block}.{path}"

    def operations(self, num_layers: int, placement: Placement) -> tuple[Operation, ...]:
        """What the host is asked to compute, in the order of a pass: 2 a block when compact, 4 as in the paper."""
        made: list[Operation] = []
        for block in range(num_layers):
            for segment in self.segments:
                key = f"block{block}.{segment.name}"
                if placement == "compact":
                    made.append(Operation(len(made), block, segment, "whole", f"{key}.in", f"{key}.out"))
                else:
                    made.append(Operation(len(made), block, segment, "inputs", f"{key}.in", None))
                    made.append(Operation(len(made), block, segment, "output", None, f"{key}.out"))
        return tuple(made)


@dataclass(frozen=True)
class Linear:
    """One linear of a block: its full path, its side, the label of the key that masks that side, and its block."""

    path: str
    side: Literal["input", "output"]
    key: str
    block: int


@dataclass(frozen=True)
class Operation:
    """One remote computation: a whole segment, its input linears, or its output linear; and the keys at its ends."""

    index: int
    block: int
    segment: Segment
    part: Literal["whole", "inputs", "output"]
    key_in: str | None
    key_out: str | None
