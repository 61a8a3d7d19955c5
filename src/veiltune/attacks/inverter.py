"""Learned inverters: a decoder from states at the cut to tokens, trained on public text through the public bottom.

*Reference.* SIP, the first part of BiSR (arXiv 2409.00960). The inverter is trained on states that crossed the agreed wire, so it
knows that defence. With ``shadow_steps`` it is trained through bottoms that were tuned as the owner's is (`attacks.shadow`).

The ridge inverter can name the tokens of its corpus, the ``vocabulary`` most frequent of them; others count as not found. The
learned one points into the embedding table and can name any token: it starts from a linear map to embeddings, fitted to the
corpus and to random tokens, and learns what context adds to that.

*Gaps.* Where positions of the texts were not sent, the learned inverter is trained on public texts cut to the lengths of those
that crossed, with the same positions left out, and guesses every token: at the gaps it has the distances to the text's ends and
what its layers gather from the states that were sent. The ridge inverter, which takes each state by itself, says nothing of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from veiltune.attacks.adapting import ridged
from veiltune.attacks.base import Attack, Auxiliary, Knowledge, Reconstruction, provider_reads, setting
from veiltune.attacks.lessons import Shapes, Teacher, scaled, shaped, shapes_of, whole
from veiltune.attacks.passes import Agreement, agreement_of, has_gaps, joined, places_in, smashed_states, spread
from veiltune.attacks.remembered import learnt
from veiltune.attacks.shadow import Shadows, Tuning
from veiltune.attacks.view import View
from veiltune.study_terms import Knows

HEADS = 4
RIDGE = 1e-3
RANDOM_SHARE = 0.25
"""Of what the learned inverter is fitted to, texts of random tokens: rare ones stand in no corpus."""
NEGATIVES = 2048
"""Random tokens that the right one is told from, beside those of the batch."""


def _with_one(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
    return torch.cat([rows, rows.new_ones((len(rows), 1))], dim=1)


@dataclass(frozen=True)
class RidgeInverter(Attack):
    """A linear map to one number a token of the vocabulary, by ridge regression; each state by itself."""

    name: ClassVar[str] = "ridge_inverter"
    summary: ClassVar[str] = "a linear inverter fitted to public text through the public bottom"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "corpus"})
    knows: ClassVar[Knows] = "public_text"
    cost: ClassVar[str] = "one pass of the corpus through the bottom and one (d, d) system; a minute on two cores"
    control: ClassVar[tuple[str, float]] = ("token_recovery", 0.6)

    vocabulary: int = 16384

    @torch.no_grad()
    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        agreed, corpus = agreement_of(view), auxiliary.take("corpus")
        shadows = Shadows(auxiliary.take("base_weights"), agreed, Tuning(0, 0.0, 1, 0.0), corpus, rng)
        frequent = Counter(token for text in corpus for token in text).most_common(self.vocabulary)
        tokens = torch.tensor(sorted(token for token, _ in frequent))
        weights = _fit_ridge(Teacher(shadows, agreed, whole(corpus), rng), tokens)
        passes = smashed_states(view)
        found = [tokens[(_with_one(scaled(each)).double() @ weights).argmax(-1)].tolist() for each in joined(passes)]
        return Reconstruction(tokens=[spread(*each) for each in zip(found, places_in(passes), strict=True)])


def _fit_ridge(teacher: Teacher, tokens: Int[Tensor, " v"]) -> Float[Tensor, "features v"]:
    """Argmin ‖H·W - Y‖² + λ‖W‖² for one-hot Y: (HᵀH + λ)⁻¹·HᵀY, where HᵀY are sums of states by token."""
    gram = sums = torch.zeros(())
    for number in range(len(teacher)):
        lesson = teacher.lesson(number)
        ids = lesson.ids[lesson.present]
        places = torch.searchsorted(tokens, ids).clamp_max(len(tokens) - 1)
        known = tokens[places] == ids
        rows = _with_one(scaled(lesson.states[lesson.present][known])).double()
        gram = gram + rows.T @ rows
        sums = torch.zeros((len(tokens), rows.shape[1]), dtype=torch.float64) if sums.dim() == 0 else sums
        sums.index_add_(0, places[known], rows)
    return torch.linalg.solve(ridged(gram, RIDGE), sums.T)


@dataclass(frozen=True)
class LearnedInverter(Attack):
    """A small transformer (``layers`` > 0) or an MLP (0) of ``width``, trained ``epochs`` times over the corpus.

    The rest says how the attacker takes the owner to tune: see `veiltune.attacks.shadow.Tuning`.
    """

    name: ClassVar[str] = "learned_inverter"
    summary: ClassVar[str] = "a small decoder trained on public text through the public bottom (SIP)"
    observer: ClassVar[str] = "provider"
    against: ClassVar = provider_reads()
    auxiliary: ClassVar[frozenset[Knowledge]] = frozenset({"base_weights", "corpus"})
    knows: ClassVar[Knows] = "public_text"
    cost: ClassVar[str] = "minutes of training on two cores for a hundred thousand public tokens"
    control: ClassVar[tuple[str, float]] = ("rougeL", 0.8)

    layers: int = setting(1, least=0)
    width: int = 384
    epochs: int = 2
    learning_rate: float = 1e-3
    shadow_steps: int = setting(0, least=0)
    shadow_alpha: float = 1.0
    shadow_rank: int = 8
    shadow_learning_rate: float = 1e-3

    def run(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> Reconstruction:
        """See `Attack.run`."""
        scores = self.scores(view, auxiliary, rng)
        return Reconstruction(tokens=[each.argmax(-1).tolist() for each in scores])

    def scores(self, view: View, auxiliary: Auxiliary, rng: torch.Generator) -> list[Float[Tensor, "_ v"]]:
        """Train, then score every token of the vocabulary at each position of the view's texts, sent or not."""
        agreed, model, corpus = agreement_of(view), auxiliary.take("base_weights"), auxiliary.take("corpus")
        passes = smashed_states(view)
        places = places_in(passes)
        shapes = shapes_of(places) if has_gaps(places) else ()
        settings = [getattr(self, each.name) for each in fields(LearnedInverter)]
        learner = partial(self._learnt, model, agreed, corpus, shapes, rng)
        weights = learnt(["inverter", *settings, agreed, shapes], model, corpus, rng, learner)
        sequences = joined(passes)
        decoder = self._decoder(model, sequences[0].shape[-1], gaps=bool(shapes))
        decoder.load_state_dict(weights)
        decoder.eval()
        with torch.no_grad():
            every = torch.arange(decoder.vocab_size)
            return [decoder(*_with_gaps(*each), every)[0] for each in zip(sequences, places, strict=True)]

    def _decoder(self, model: Any, channels: int, *, gaps: bool) -> _Decoder:
        table = model.get_input_embeddings().weight.detach().float()
        return _Decoder(channels + 1, self.width, self.layers, table, gaps=gaps)

    def _learnt(
        self, model: Any, agreed: Agreement, corpus: Sequence[Sequence[int]], shapes: Shapes, rng: torch.Generator
    ) -> dict[str, Tensor]:
        """A trained decoder's state: all but the table, which is public."""
        tuning = Tuning(self.shadow_steps, self.shadow_alpha, self.shadow_rank, self.shadow_learning_rate)
        shadows = Shadows(model, agreed, tuning, corpus, rng)
        texts = [*corpus, *_random_texts(corpus, len(model.get_input_embeddings().weight), rng)]
        teacher = Teacher(shadows, agreed, shaped(texts, shapes, rng) if shapes else whole(texts), rng)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=rng)))
            decoder = self._decoder(model, teacher.lesson(0).states.shape[-1], gaps=bool(shapes))
            decoder.prepare(teacher)
            self._train(decoder, teacher)
        return decoder.state_dict()

    def _train(self, decoder: _Decoder, teacher: Teacher) -> None:
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=self.learning_rate, weight_decay=0.01)
        total = self.epochs * len(teacher)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total + 1)
        decoder.train()
        for _ in range(self.epochs):
            for number in torch.randperm(len(teacher)).tolist():
                lesson = teacher.lesson(number)
                ids = lesson.ids[lesson.present]
                classes = _classes(ids, decoder.vocab_size)
                pointed = decoder.pointed(lesson.states, lesson.sent, lesson.present)[lesson.present]
                loss = functional.cross_entropy(decoder.scored(pointed, classes), torch.searchsorted(classes, ids))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        decoder.eval()


def _random_texts(corpus: Sequence[Sequence[int]], vocabulary: int, rng: torch.Generator) -> list[list[int]]:
    count = max(1, int(RANDOM_SHARE * len(corpus)))
    length = max(1, sum(len(text) for text in corpus) // len(corpus))
    return torch.randint(vocabulary, (count, length), generator=rng).tolist()


def _with_gaps(
    seen: Float[Tensor, "sent k"], places: Int[Tensor, " sent"]
) -> tuple[Float[Tensor, "one seq k"], Bool[Tensor, "one seq"]]:
    """The states of one text at their places, zeros between them, and which are there."""
    sent = torch.zeros(int(places[-1]) + 1, dtype=torch.bool)
    sent[places] = True
    states = seen.new_zeros((len(sent), seen.shape[1]))
    states[places] = seen
    return states[None], sent[None]


def _classes(ids: Int[Tensor, " n"], vocabulary: int) -> Int[Tensor, " c"]:
    """The tokens that a batch's loss compares, sorted: its own, and random ones where the vocabulary is large."""
    if vocabulary <= 2 * NEGATIVES:
        return torch.arange(vocabulary)
    return torch.unique(torch.cat([ids, torch.randint(vocabulary, (NEGATIVES,))]))


class _Decoder(nn.Module):
    """States to scores of tokens: a linear map to embeddings, corrected by layers that look both ways along the text.

    With ``gaps`` a learned vector stands for each state that is missing, and every position is told its distances to the ends.
    """

    def __init__(self, inputs: int, width: int, layers: int, table: Float[Tensor, "v d"], *, gaps: bool) -> None:
        super().__init__()
        self.vocab_size = len(table)
        self.register_buffer("table", functional.normalize(table - table.mean(0), dim=-1), persistent=False)
        self.register_buffer("centre", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.linear = nn.Linear(inputs, table.shape[1])
        self.enter = nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 2 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.leave = nn.Linear(width, table.shape[1])
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.sharpness = nn.Parameter(torch.tensor(3.0))
        self.missing = nn.Parameter(torch.zeros(width)) if gaps else None
        self.place = nn.Linear(width, width) if gaps else None

    @torch.no_grad()
    def prepare(self, teacher: Teacher) -> None:
        """Standardise inputs by the lessons', and fit the linear map to them by ridge regression."""
        lessons = [teacher.lesson(number) for number in range(len(teacher))]
        rows = torch.cat([scaled(lesson.states[lesson.present]) for lesson in lessons])
        self.get_buffer("centre").copy_(rows.mean(0))
        self.get_buffer("spread").copy_(rows.std(0).clamp_min(1e-6))
        wanted = self.get_buffer("table")[torch.cat([lesson.ids[lesson.present] for lesson in lessons])]
        inputs = self._standardised(rows)
        gram = ridged((inputs.T @ inputs).double(), RIDGE)
        self.linear.weight.copy_(torch.linalg.solve(gram, (inputs.T @ (wanted - wanted.mean(0))).double()).T)
        self.linear.bias.copy_(wanted.mean(0))

    def _standardised(self, rows: Tensor) -> Tensor:
        return (rows - self.get_buffer("centre")) / self.get_buffer("spread")

    def forward(
        self, states: Float[Tensor, "n seq k"], sent: Bool[Tensor, "n seq"], classes: Int[Tensor, " c"]
    ) -> Float[Tensor, "n seq c"]:
        """Scores of the tokens ``classes`` at every position."""
        return self.scored(self.pointed(states, sent), classes)

    def pointed(
        self,
        states: Float[Tensor, "n seq k"],
        sent: Bool[Tensor, "n seq"],
        present: Bool[Tensor, "n seq"] | None = None,
    ) -> Float[Tensor, "n seq d"]:
        """Where in the space of embeddings each position's token is taken to be; of length 1.

        Args:
            states: as they were sent.
            sent: which were. Without ``gaps`` all are there, and it tells nothing.
            present: where there is a token, if not everywhere.
        """
        rows, padding = self._standardised(scaled(states)), None if present is None else ~present
        hidden = self.enter(rows)
        if self.missing is not None and self.place is not None:
            rows = rows * sent[..., None]
            hidden = torch.where(sent[..., None], hidden, self.missing)
            hidden = hidden + self.place(
                _distances(torch.ones_like(sent) if present is None else present, len(self.missing))
            )
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=padding)
        return functional.normalize(self.linear(rows) + self.leave(hidden), dim=-1)

    def scored(self, pointed: Float[Tensor, "*batch d"], classes: Int[Tensor, " c"]) -> Float[Tensor, "*batch c"]:
        """How near each of the tokens ``classes`` is to that."""
        return self.sharpness.exp() * pointed @ self.get_buffer("table")[classes].T


def _distances(present: Bool[Tensor, "n seq"], width: int) -> Float[Tensor, "n seq width"]:
    """Sines and cosines of each position's distances from both ends of its text."""
    start = torch.arange(present.shape[1]).expand(present.shape)
    end = present.sum(1, keepdim=True) - 1 - start
    rates = 1e-4 ** (torch.arange(width // 4) / (width // 4))
    angles = [each[..., None] * rates for each in (start, end)]
    return torch.cat([wave(each) for each in angles for wave in (torch.sin, torch.cos)], dim=-1)
