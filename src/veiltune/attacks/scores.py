"""How much of the truth a reconstruction holds.

Words are runs of letters and digits in lower case, as the common ROUGE scorers take them. Sensitive words are told by rule:
whatever holds a digit, and capitalised words that do not begin a sentence or a line. A metric that a text has no use for
(ROUGE-2 of one word, sensitive words where there are none) leaves that text out.

*Reference.* Lin, "ROUGE" (2004), F1 with equal weights; intervals by the percentile bootstrap over sequences (Efron 1979).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

RESAMPLES = 2000
_WORD = re.compile(r"[^\W_]+")
_SENSITIVE = re.compile(r"\d[\d.,:/-]*\d|\w*\d\w*|(?<![.!?:\n] )(?<!\n)(?<!^)\b[A-Z][\w'-]+")

Decode: TypeAlias = Callable[[Sequence[int]], str]
PerSequence: TypeAlias = dict[str, list[float | None]]


def f1(common: int, truth: int, found: int) -> float:
    """The harmonic mean of recall (common / truth) and precision (common / found); 0 if nothing is common."""
    return 2 * common / (truth + found) if common else 0.0


def overlap_f1(truth: Sequence[Hashable], found: Sequence[Hashable], n: int = 1) -> float | None:
    """F1 of n-grams, each counted as often as it occurs (ROUGE-n); None if the truth has none."""
    grams = [Counter(tuple(each[i : i + n]) for i in range(len(each) - n + 1)) for each in (truth, found)]
    if not grams[0]:
        return None
    return f1((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())


def lcs_length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, start=1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(truth: Sequence[Hashable], found: Sequence[Hashable]) -> float | None:
    """F1 of the longest common subsequence; None if the truth is empty."""
    return f1(lcs_length(truth, found), len(truth), len(found)) if truth else None


def token_recovery(truth: Sequence[int], found: Sequence[int]) -> float | None:
    """Share of the truth's positions at which the same token was found."""
    return sum(a == b for a, b in zip(truth, found, strict=False)) / len(truth) if truth else None


def sensitive_words(text: str) -> list[str]:
    """Numbers, and capitalised words in the middle of a sentence, in order."""
    return _SENSITIVE.findall(text)


def sensitive_recall(truth: str, found: str) -> float | None:
    """Share of the truth's sensitive words that stand in what was found, counted as often as they occur."""
    wanted = Counter(sensitive_words(truth))
    if not wanted:
        return None
    have = Counter({word: len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", found)) for word in wanted})
    return (wanted & have).total() / wanted.total()


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def score_text(truth: Sequence[int], found: Sequence[int], decode: Decode) -> dict[str, float | None]:
    """Every text metric of one sequence of token ids; negative ids are positions without a guess."""
    guessed = [token for token in found if token >= 0]
    truth_text, found_text = decode(truth), decode(guessed)
    truth_words, found_words = words(truth_text), words(found_text)
    return {
        "rouge1": overlap_f1(truth_words, found_words),
        "rouge2": overlap_f1(truth_words, found_words, 2),
        "rougeL": rouge_l(truth_words, found_words),
        "token_recovery": token_recovery(truth, found),
        "bag_f1": overlap_f1(truth, guessed),
        "exact": float(list(truth) == list(found)),
        "sensitive_recall": sensitive_recall(truth_text, found_text),
    }


def score_texts(truth: Sequence[Sequence[int]], found: Sequence[Sequence[int]], decode: Decode) -> PerSequence:
    """Every text metric, sequence by sequence.

    Raises:
        ValueError: not as many sequences were found as there are.
    """
    rows = [score_text(*pair, decode) for pair in zip(truth, found, strict=True)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def score_labels(truth: Sequence[Sequence[int]], found: Sequence[Sequence[int]], decode: Decode) -> PerSequence:
    """Labels of each sequence, aligned with its tokens, -100 where there is none.

    ``label_recovery`` is the share of labelled positions with the right token there, ``label_precision`` that of positions taken
    for labelled; the rest are text metrics of the labelled tokens in order. The first token never bears loss, so it never counts.
    """
    rows: list[dict[str, float | None]] = []
    for true, mine in zip(truth, found, strict=True):
        right = sum(a == b and a >= 0 for a, b in zip(true[1:], mine[1:], strict=False))
        texts = [[token for token in each[1:] if token >= 0] for each in (true, mine)]
        text = score_text(texts[0], texts[1], decode)
        rows.append({"label_recovery": right / len(texts[0]) if texts[0] else None})
        rows[-1] |= {"label_precision": right / len(texts[1]) if texts[1] else 0.0}
        rows[-1] |= {f"label_{name}": text[name] for name in ("rougeL", "bag_f1", "exact")}
    return {name: [row[name] for row in rows] for name in rows[0]}


def score_predictions(truth: Sequence[Sequence[int]], found: Sequence[Sequence[int]], what: str) -> PerSequence:
    """Share of each text's next tokens that a model predicts, as the metric ``what``."""
    return {what: [token_recovery(*pair) for pair in zip(truth, found, strict=True)]}


# --- tensors ----------------------------------------------------------------------------------------------------------


def relative_error(truth: Tensor, found: Tensor) -> float:
    """‖found - truth‖ / ‖truth‖ in the Frobenius norm."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def mean_cosine(truth: Tensor, found: Tensor) -> float:
    """The mean cosine of corresponding rows; a row of zeros has the cosine 0."""
    a, b = truth.double().flatten(0, -2), found.double().flatten(0, -2)
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30).mean())


def score_tensors(truth: Sequence[Tensor], found: Sequence[Tensor], what: str) -> PerSequence:
    """``{what}_error`` and ``{what}_cosine`` of corresponding tensors, over the rows that both have; None for other widths."""
    pairs = [_common_rows(*pair) for pair in zip(truth, found, strict=True)]
    return {
        f"{what}_error": [None if pair is None else relative_error(*pair) for pair in pairs],
        f"{what}_cosine": [None if pair is None else mean_cosine(*pair) for pair in pairs],
    }


def score_units(truth: Sequence[Tensor], found: Sequence[Tensor]) -> PerSequence:
    """Rows that are vectors of hidden units: the share whose most alike true one is their own, beside error and cosine."""
    pairs = [_common_rows(*pair) for pair in zip(truth, found, strict=True)]
    return score_tensors(truth, found, "unit") | {
        "unit_accuracy": [None if pair is None else _own_share(*pair) for pair in pairs]
    }


def _own_share(truth: Tensor, found: Tensor) -> float:
    normal = torch.nn.functional.normalize
    nearest = (normal(found.float(), dim=-1) @ normal(truth.float(), dim=-1).T).argmax(1)
    return float((nearest == torch.arange(len(nearest))).double().mean())


def score_sources(truth: Sequence[Tensor], found: Sequence[Tensor]) -> PerSequence:
    """``basis_correlation``: the absolute correlation of each source with the true coordinate that is assigned to it.

    Sources, not sequences, are what is counted. Assigning chooses the best of many, so chance is above zero: the more so the
    fewer the rows, which the shuffled control shows.
    """
    from scipy.optimize import linear_sum_assignment

    rows = [min(len(a), len(b)) for a, b in zip(truth, found, strict=True)]
    ours, theirs = (
        torch.cat([each[:n] for each, n in zip(side, rows, strict=True)]).double() for side in (truth, found)
    )
    ours, theirs = (torch.nn.functional.normalize(side - side.mean(0), dim=0) for side in (ours, theirs))
    alike = (ours.T @ theirs).abs()
    places, sources = linear_sum_assignment(alike.numpy(), maximize=True)
    return {"basis_correlation": list(alike[places, sources].tolist())}


def _common_rows(truth: Tensor, found: Tensor) -> tuple[Tensor, Tensor] | None:
    rows = min(len(truth), len(found))
    return (truth[:rows], found[:rows]) if truth.shape[1:] == found.shape[1:] else None


# --- summaries --------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None if none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def bootstrap(values: Sequence[float | None], generator: torch.Generator) -> tuple[float, float] | None:
    """The percentile 95% interval of the mean over sequences; None for fewer than two."""
    present = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
    if len(present) < 2:
        return None
    draws = torch.randint(len(present), (RESAMPLES, len(present)), generator=generator)
    low, high = torch.quantile(present[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    centre = float(present.mean())
    return min(low, centre), max(high, centre)


def means(scores: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """The mean of each metric that has any value."""
    return {name: value for name, values in scores.items() if (value := mean(values)) is not None}
