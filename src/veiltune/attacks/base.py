"""What an attack is: it is given a view and the auxiliary knowledge it declares, and returns what it thinks was there.

The truth never comes near it: whoever scores holds that. An attack is a frozen dataclass whose fields are its settings, so
that a row of results can say under which it was run.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from veiltune.attacks.view import View
from veiltune.errors import ProtocolError, UserError
from veiltune.models.bottom import Bottom
from veiltune.study_terms import ALL_PHASES, Knows, Phase

Knowledge = Literal["base_weights", "corpus", "embedding_table", "public_ancestor", "ancestor_model", "known_pairs"]
FirstState = Literal["normed", "raw", "centred"]
UNKNOWN = -1
"""Stands in the place of a token that an attack says nothing of."""
KnownPair = tuple[int, int, int]
"""Number of a sequence among those of the view, position in it, and the token that stands there."""


def setting(default: Any, *, least: float) -> Any:
    """A setting of an attack whose least value is not the usual one (1 for integers, 0 for other numbers)."""
    return field(default=default, metadata={"least": least})


class EmbeddingTable:
    """The states of single tokens that enter the first block, as whoever has the embeddings can compute them.

    Args:
        model: a causal language model, of which embeddings (and the first norm) are used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._bottom = Bottom(model, 0)
        self.vocab_size = self._bottom.vocab_size
        self.has_positions = self._bottom.has_positions

    def form(self, design: str) -> FirstState:
        """In what form a design sends first states: as the first block reads them, or as they enter the trunk.

        `veil` centres them where there are learned positions: those families have LayerNorms.
        """
        if design != "veil":
            return "normed"
        return "centred" if self.has_positions else "raw"

    @torch.no_grad()
    def states(self, tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"], form: FirstState) -> Float[Tensor, "n d"]:
        """States of tokens at positions: what the first block reads (normed), takes in (raw), or that less its mean."""
        raw = self._bottom.states(tokens[:, None], position_ids=positions[:, None])[:, 0]
        if form == "normed":
            return self._bottom.first_norm(raw)
        return raw if form == "raw" else raw - raw.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Auxiliary:
    """What an attacker has beside its view. Only what an attack declares can be taken from it.

    Attributes:
        granted: names of what may be read.
        base_weights: the causal language model as it was before tuning.
        corpus: tokenised public text, disjoint from the victim's.
        embedding_table: see `EmbeddingTable`.
        public_ancestor: weights that the secret ones descend from, by parameter name.
        ancestor_model: the model with such weights in its blocks.
        known_pairs: tokens that the attacker knows, and where they stand.
    """

    granted: frozenset[str] = frozenset()
    base_weights: nn.Module | None = field(default=None, repr=False)
    corpus: Sequence[Sequence[int]] | None = field(default=None, repr=False)
    embedding_table: EmbeddingTable | None = field(default=None, repr=False)
    public_ancestor: Mapping[str, Tensor] | None = field(default=None, repr=False)
    ancestor_model: nn.Module | None = field(default=None, repr=False)
    known_pairs: Sequence[KnownPair] | None = field(default=None, repr=False)

    def take(self, name: Knowledge) -> Any:
        """One kind of knowledge.

        Raises:
            ProtocolError: it was not declared.
            UserError: it was not given.
        """
        if name not in self.granted:
            raise ProtocolError(
                f"the attack takes {name!r}, which it does not declare", hint="add it to its `auxiliary`"
            )
        value = getattr(self, name)
        if value is None:
            raise UserError(f"the attack needs {name!r}, which is not there", hint="give it to the attack's auxiliary")
        return value


@dataclass(frozen=True)
class Reconstruction:
    """What an attack came up with; ``None`` is what it did not try.

    Attributes:
        tokens: token ids of each sequence of the view's passes, in order; `UNKNOWN` where the attack has no guess.
        alike: numbers of sequences that nothing seen tells apart: their texts stand in any order.
        states: (length, d) plain first states of each sequence.
        weights: plain weights, by parameter name (of a folded trunk: folded ones).
        units: of an MLP's linears, one row a hidden unit, by parameter name: weights whose order was secret.
        sources: (length, m) what each sequence's states come apart into, in any order, of any sign and size.
        source_truth: what these should be, where the attack made its own control (`Attack.leaky`).
        labels: of each sequence, as long as it is: the token at each labelled position, -100 elsewhere.
        predict: the stolen model, as what it takes for the next token after each token of a text but the last.
    """

    tokens: Sequence[Sequence[int]] | None = field(default=None, repr=False)
    alike: Sequence[Sequence[int]] = ()
    states: Sequence[Tensor] | None = field(default=None, repr=False)
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False)
    units: Mapping[str, Tensor] | None = field(default=None, repr=False)
    sources: Sequence[Tensor] | None = field(default=None, repr=False)
    source_truth: Sequence[Tensor] | None = field(default=None, repr=False)
    labels: Sequence[Sequence[int]] | None = field(default=None, repr=False)
    predict: Callable[[Sequence[int]], list[int]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Attack(ABC):
    """Base of all attacks. Subclasses are frozen dataclasses.

    Class attributes:
        name: in the table `ATTACKS`.
        summary: one line for people.
        observer: whose view it reads.
        against: by design, the fields it reads, as ``Kind.field``.
        auxiliary: what it takes beside the view.
        knows: the same in the vocabulary in which attackers are told apart: what it takes beyond what the observer has itself.
        phases: texts that it can be after; of gradients, those tuned on.
        cost: what a run takes, roughly, in words.
        control: metric (more is more) and least value that the leaky control must reach.
        leaky_settings: settings changed for the leaky control, where protection lies in what the attacker has.
        of_texts: whether it is after the texts that crossed; else no pass need have been recorded.
        leaky_knows_text: whether the leaky control's corpus is the victim's text.
        leaky_layers: blocks before the states of the leaky control's view; ``None``: as many as there were.
        single_tokens: whether it can only read states of single tokens, so none that went through a block.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    observer: ClassVar[str]
    against: ClassVar[Mapping[str, frozenset[str]]]
    auxiliary: ClassVar[frozenset[Knowledge]]
    knows: ClassVar[Knows]
    phases: ClassVar[frozenset[Phase]] = frozenset(ALL_PHASES)
    cost: ClassVar[str]
    control: ClassVar[tuple[str, float]] = ("token_recovery", 0.95)
    leaky_settings: ClassVar[Mapping[str, Any]] = {}
    of_texts: ClassVar[bool] = True
    leaky_knows_text: ClassVar[bool] = False
    leaky_layers: ClassVar[int | None] = None
    single_tokens: ClassVar[bool] = False

    @property
    def reads(self) -> frozenset[str]:
        """Every field that it may read under some design."""
        return frozenset().union(*self.against.values())

    def takes(self, design: str, layers: int) -> frozenset[Knowledge]:  # noqa: ARG002
        """What of its `auxiliary` it takes on one run; the rest is neither made nor granted.

        Args:
            design: the run's.
            layers: blocks of the model in an enclave, before the states that the host is sent.
        """
        return self.auxiliary

    @property
    def setting(self) -> str:
        """The settings that are not the defaults, as ``key=value, …``; empty if all are."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in changed)

    @abstractmethod
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """Attack a view that was loaded for this attack's ``reads``. Sequences come in the order of the view's passes."""

    def leaky(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """The leaky control: the same on a view without protection, with `leaky_settings`."""
        return dataclasses.replace(self, **self.leaky_settings).run(view, auxiliary, rng)


def predictions(model: Any, text: Sequence[int]) -> list[int]:
    """The likeliest next token after each token of a text but the last, by a causal language model."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(text)]), use_cache=False).logits
    return logits[0, :-1].argmax(-1).tolist()


def provider_reads(*more: str) -> Mapping[str, frozenset[str]]:
    """What attacks on states at the cut read, under each design that cuts the model."""
    fields = frozenset(
        {
            "SplitRequest.terms",
            "TrunkForward.cache_id",
            "TrunkForward.hidden",
            "TrunkForward.attention_mask",
            "TrunkForward.position_ids",
            *more,
        }
    )
    return dict.fromkeys(("split", "online", "gradfree", "offsite", "offline"), fields)
