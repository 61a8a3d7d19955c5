"""Scores of attacks against slow twins that follow the definitions word by word; intervals; the rule about controls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from veiltune.attacks import scores
from veiltune.attacks.controls import Finding, Trial, require_controls, shuffled
from veiltune.errors import ExactnessError, UserError

texts = st.lists(st.integers(0, 4), max_size=7)


def slow_lcs(a: Sequence[int], b: Sequence[int]) -> int:
    """The longest common subsequence by trying every subsequence."""
    inside = {
        tuple(b[i] for i in chosen) for n in range(len(b) + 1) for chosen in itertools.combinations(range(len(b)), n)
    }
    return max(n for n in range(len(a) + 1) for chosen in itertools.combinations(a, n) if chosen in inside)


def slow_overlap(truth: Sequence[int], found: Sequence[int], n: int) -> float | None:
    """F1 of n-grams by crossing out."""
    wanted = [tuple(truth[i : i + n]) for i in range(len(truth) - n + 1)]
    have = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    if not wanted:
        return None
    left, common = list(have), 0
    for gram in wanted:
        if gram in left:
            left.remove(gram)
            common += 1
    if not common:
        return 0.0
    recall, precision = common / len(wanted), common / len(have)
    return 2 * recall * precision / (recall + precision)


@given(texts, texts)
def test_the_longest_common_subsequence_is_the_longest(a: list[int], b: list[int]) -> None:
    assert scores.lcs_length(a, b) == slow_lcs(a, b) == scores.lcs_length(b, a)


@given(texts, texts, st.integers(1, 3))
def test_overlap_counts_as_crossing_out_does(a: list[int], b: list[int], n: int) -> None:
    fast, slow = scores.overlap_f1(a, b, n), slow_overlap(a, b, n)
    assert (fast is None) == (slow is None)
    assert fast is None or slow is None or math.isclose(fast, slow, abs_tol=1e-12)


@given(texts, texts)
def test_positional_recovery_needs_the_place(a: list[int], b: list[int]) -> None:
    expected = [i < len(b) and a[i] == b[i] for i in range(len(a))]
    assert scores.token_recovery(a, b) == (sum(expected) / len(a) if a else None)


def test_every_metric_of_a_known_case() -> None:
    vocabulary = ["the ", "cat ", "sat ", "on ", "Ada ", "in ", "1999 "]

    def decode(ids: Sequence[int]) -> str:
        return "".join(vocabulary[i] for i in ids)

    found = scores.score_text([0, 1, 2, 3, 4, 6], [0, 2, 1, 3, 4], decode)
    assert found["token_recovery"] == pytest.approx(3 / 6)  # the, on, Ada stand in their places
    assert found["bag_f1"] == found["rouge1"] == pytest.approx(2 * 5 / 11)
    assert found["rouge2"] == pytest.approx(2 * 1 / (5 + 4))  # "on ada"
    assert found["rougeL"] == pytest.approx(2 * 4 / 11)
    assert found["exact"] == 0.0
    assert found["sensitive_recall"] == 0.5  # Ada, not 1999
    assert set(scores.score_text([1, 2], [1, 2], decode).values()) == {1.0, None}, "nothing sensitive: no figure"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada met Bob at 10:30 on 12/05/1999.", ["Bob", "10:30", "12/05/1999"]),
        ("It rained. Then Ada left.", ["Ada"]),
        ("Question: What is 7 times 8?\nAnswer: 56", ["7", "8", "56"]),
        ("flight BA117 to O'Hare", ["BA117", "O'Hare"]),
        ("nothing here", []),
    ],
)
def test_sensitive_words_by_the_stated_rule(text: str, expected: list[str]) -> None:
    assert scores.sensitive_words(text) == expected


def test_sensitive_recall_asks_for_whole_words_as_often_as_they_occur() -> None:
    assert scores.sensitive_recall("we saw Ada and Ada and 12", "we saw Ada and 123") == pytest.approx(1 / 3)
    assert scores.sensitive_recall("nothing", "Ada") is None


def test_tensor_scores() -> None:
    truth = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert scores.relative_error(truth, truth) == 0.0
    assert scores.relative_error(truth, 2 * truth) == pytest.approx(1.0)
    assert scores.mean_cosine(truth, 2 * truth) == pytest.approx(1.0)
    assert scores.mean_cosine(truth, torch.tensor([[4.0, -3.0], [0.0, -1.0]])) == pytest.approx(-0.5)
    both = scores.score_tensors([truth, truth], [truth[:1], torch.ones(2, 3)], "state")
    assert both == {"state_error": [0.0, None], "state_cosine": [pytest.approx(1.0), None]}


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_mean_and_covers_the_truth_about_as_often_as_it_says() -> None:
    generator, hits = torch.Generator().manual_seed(0), 0
    rounds, size, share = 200, 40, 0.3
    for _ in range(rounds):
        values = (torch.rand(size, generator=generator) < share).double().tolist()
        interval = scores.bootstrap(values, generator)
        assert interval is not None
        assert interval[0] <= sum(values) / size <= interval[1]
        hits += interval[0] <= share <= interval[1]
    # 95% less what a percentile bootstrap of 40 lacks (about 2 points), 4 standard errors either way
    assert 0.86 < hits / rounds <= 1.0
    assert hits < rounds, "an interval that never misses is too wide"


def test_one_sequence_has_no_interval_and_equal_ones_have_no_width() -> None:
    generator = torch.Generator().manual_seed(0)
    assert scores.bootstrap([0.5], generator) is None
    assert scores.bootstrap([0.5, None], generator) is None
    assert scores.bootstrap([0.5, 0.5, None], generator) == (0.5, 0.5)


# --- controls ---------------------------------------------------------------------------------------------------------


def equality(truth: Sequence[Any], found: Sequence[Any]) -> dict[str, list[float | None]]:
    return {"token_recovery": [float(a == b) for a, b in zip(truth, found, strict=True)]}


def finding(**changes: Any) -> Finding:
    values: dict[str, Any] = {"value": 0.5, "n": 3, "ci95": None, "leaky_control": 1.0, "shuffled_control": 0.0}
    return Finding("a", "host", "d", "", "token_recovery", **{**values, **changes})


@pytest.mark.parametrize("name", ["leaky_control", "shuffled_control", "value"])
@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_row_without_both_controls_cannot_be_made(name: str, missing: Any) -> None:
    finding()
    with pytest.raises(Exception, match=name):
        finding(**{name: missing})


def test_shuffling_pairs_everything_with_every_other_and_never_with_itself() -> None:
    assert shuffled(equality, [1, 2, 3], [1, 2, 3]) == {"token_recovery": 0.0}
    assert shuffled(equality, [1, 1, 2], [1, 1, 2])["token_recovery"] == pytest.approx(2 / 6)
    with pytest.raises(UserError, match="one sequence"):
        shuffled(equality, [1], [1])


def test_figures_carry_value_and_controls() -> None:
    trial = Trial(equality, [1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 9])
    (figure,) = trial.figures(torch.Generator().manual_seed(0)).values()
    assert (figure["value"], figure["n"], figure["leaky_control"], figure["shuffled_control"]) == (0.5, 4, 0.75, 0.0)
    assert trial.chance() == {"token_recovery": 0.0}


@pytest.mark.parametrize(
    ("leaky", "crossed", "chance", "culprit"),
    [(0.95, 0.2, 0.15, None), (0.94, 0.2, 0.15, "leaky"), (1.0, 0.3, 0.15, "shuffled")],
)
def test_a_failed_control_withholds_everything(
    leaky: float, crossed: float, chance: float, culprit: str | None
) -> None:
    figures = {"token_recovery": {"leaky_control": leaky, "shuffled_control": crossed}}
    arguments = ("a", ("token_recovery", 0.95), figures, {"token_recovery": chance})
    if culprit is None:
        require_controls(*arguments)
    else:
        with pytest.raises(ExactnessError, match=culprit):
            require_controls(*arguments)


def test_an_unmeasured_control_withholds_everything() -> None:
    with pytest.raises(ExactnessError, match="no control"):
        require_controls("a", ("rougeL", 0.5), {}, {})
