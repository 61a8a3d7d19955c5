"""Learned inverters: a decoder from states at the cut to tokens, trained on public text through the public bottom.

*Reference.* SIP, the first part of BiSR (arXiv 2409.00960). The inverter is trained on states that were rounded as the agreed
wire rounds, so it knows that defence; it does not know how the bottom was tuned since.

The vocabulary it can name is that of its corpus, the ``vocabulary`` most frequent tokens of it; others cannot be found, and
count as not found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, provider_reads
from veiltune.attacks.passes import Agreement, agreement_of, joined, smashed_states
from veiltune.attacks.view import View
from veiltune.models.bottom import Bottom

BATCH = 16
HEADS = 4
RIDGE = 1e-3
OTHER = -100
"""Label of tokens outside the vocabulary: nothing is learnt from them."""


@dataclass(frozen=True)
class _Lesson:
    """Public states as the provider would get them, right-padded, and their tokens as numbers of the vocabulary."""

    states: Float[Tensor, "n seq d"]
    labels: Int[Tensor, "n seq"]
    padding: Bool[Tensor, "n seq"]

    @property
    def present(self) -> Tensor:
        return self.labels >= 0


class _Teacher:
    """Makes lessons of public text."""

    def __init__(self, bottom: Bottom, agreed: Agreement, corpus: Sequence[Sequence[int]], vocabulary: int) -> None:
        self.bottom = bottom
        self.agreed = agreed
        self.corpus = sorted((list(text) for text in corpus), key=len)
        frequent = Counter(token for text in corpus for token in text).most_common(vocabulary)
        self.tokens = torch.tensor(sorted(token for token, _ in frequent))
        self._number = torch.full((bottom.vocab_size,), OTHER)
        self._number[self.tokens] = torch.arange(len(self.tokens))

    def lessons(self) -> Iterator[_Lesson]:
        """The whole corpus once, texts of like length together."""
        for start in range(0, len(self.corpus), BATCH):
            texts = [torch.tensor(text) for text in self.corpus[start : start + BATCH]]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)
            labels = nn.utils.rnn.pad_sequence([self._number[text] for text in texts], True, OTHER)
            lengths = torch.tensor([len(text) for text in texts])
            padding = torch.arange(ids.shape[1]) >= lengths[:, None]
            with torch.no_grad():
                states = self.agreed.rounded(self.bottom.states(ids), starts=True)
            yield _Lesson(states, labels, padding)


@dataclass(frozen=True)
class RidgeInverter(Attack):
    """A linear map to one number a token of the vocabulary, by ridge regression; each state by itself."""

    name: ClassVar[str] = "ridge_inverter"
    summary: ClassVar[str] = "a linear inverter fitted to public text through the public bottom"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "corpus"})
    cost: ClassVar[str] = "one pass of the corpus through the bottom and one (d, d) system; a minute on two cores"
    control: ClassVar[tuple[str, float]] = ("token_recovery", 0.6)

    vocabulary: int = 16384

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:  # noqa: ARG002
        """See `Attack.run`."""
        agreed = agreement_of(view)
        bottom = Bottom(auxiliary.take("base_weights"), agreed.bottom_layers)
        teacher = _Teacher(bottom, agreed, auxiliary.take("corpus"), self.vocabulary)
        weights = _fit_ridge(teacher)
        tokens = [
            teacher.tokens[(_with_one(_scaled(each)).double() @ weights).argmax(-1)].tolist()
            for each in joined(smashed_states(view))
        ]
        return Reconstruction(tokens=tokens)


def _fit_ridge(teacher: _Teacher) -> Float[Tensor, "features v"]:
    """Argmin ‖H·W - Y‖² + λ‖W‖² for one-hot Y: (HᵀH + λ)⁻¹·HᵀY, where HᵀY are sums of states by token."""
    width, count = teacher.bottom.width + 1, len(teacher.tokens)
    gram = torch.zeros((width, width), dtype=torch.float64)
    sums = torch.zeros((count, width), dtype=torch.float64)
    for lesson in teacher.lessons():
        rows = _with_one(_scaled(lesson.states[lesson.present])).double()
        gram += rows.T @ rows
        sums.index_add_(0, lesson.labels[lesson.present], rows)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    return torch.linalg.solve(gram, sums.T)


def _scaled(states: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
    """Each state divided by its root mean square: the first position's is far larger than the others'."""
    return states / states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _with_one(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
    return torch.cat([rows, rows.new_ones((len(rows), 1))], dim=1)


@dataclass(frozen=True)
class LearnedInverter(Attack):
    """A small transformer (``layers`` > 0) or an MLP (0) of ``width``, trained ``epochs`` times over the corpus."""

    name: ClassVar[str] = "learned_inverter"
    summary: ClassVar[str] = "a small decoder trained on public text through the public bottom (SIP)"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "corpus"})
    cost: ClassVar[str] = "minutes of training on two cores for some hundred public passages"
    control: ClassVar[tuple[str, float]] = ("rougeL", 0.8)

    layers: int = 1
    width: int = 384
    epochs: int = 6
    learning_rate: float = 1e-3
    vocabulary: int = 16384

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed = agreement_of(view)
        bottom = Bottom(auxiliary.take("base_weights"), agreed.bottom_layers)
        teacher = _Teacher(bottom, agreed, auxiliary.take("corpus"), self.vocabulary)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=rng)))
            decoder = _Decoder(bottom.width, self.width, self.layers, len(teacher.tokens))
            self._train(decoder, teacher)
        with torch.no_grad():
            sequences = joined(smashed_states(view))
            return Reconstruction(
                tokens=[teacher.tokens[decoder(each[None])[0].argmax(-1)].tolist() for each in sequences]
            )

    def _train(self, decoder: _Decoder, teacher: _Teacher) -> None:
        lessons = list(teacher.lessons())
        decoder.prepare(torch.cat([_scaled(lesson.states[lesson.present]) for lesson in lessons]))
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=self.learning_rate, weight_decay=0.01)
        total = self.epochs * len(lessons)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total + 1)
        decoder.train()
        for _ in range(self.epochs):
            for number in torch.randperm(len(lessons)).tolist():
                lesson = lessons[number]
                logits = decoder(lesson.states, lesson.padding)
                loss = functional.cross_entropy(logits[lesson.present], lesson.labels[lesson.present])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        decoder.eval()


class _Decoder(nn.Module):
    """States to logits over the vocabulary: a projection, layers that look both ways along the text, a head."""

    def __init__(self, inputs: int, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.enter = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.skip = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def prepare(self, rows: Float[Tensor, "n d"]) -> None:
        """Standardise inputs by these."""
        self.get_buffer("centre").copy_(rows.mean(0))
        self.get_buffer("spread").copy_(rows.std(0).clamp_min(1e-6))

    def forward(self, states: Float[Tensor, "n seq d"], padding: Tensor | None = None) -> Float[Tensor, "n seq v"]:
        rows = (_scaled(states) - self.get_buffer("centre")) / self.get_buffer("spread")
        hidden = self.skip(rows) + self.enter(rows)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=padding)
        return self.head(hidden)
