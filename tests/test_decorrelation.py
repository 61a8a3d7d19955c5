"""Distance correlation against two independent twins, at its edges, and as a regulariser that does what it is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from veiltune.config import load_config
from veiltune.errors import ConfigError
from veiltune.privacy.decorrelation import Decorrelation, DecorrelationOptions, distance_correlation, sample_rows

Oracle = Callable[[Tensor, Tensor], float]
SEEDS = st.integers(0, 2**31)


def rows(n: int, p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, p, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def value(x: Tensor, y: Tensor) -> float:
    return float(distance_correlation(x, y))


def gradients(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    distance_correlation(x, y).backward()
    assert x.grad is not None
    assert y.grad is not None
    return x.grad, y.grad


def exact_matrices(x: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """D and the double-centred A, written out, every sum correctly rounded."""
    points = x.tolist()
    n = len(points)
    D = [[math.dist(a, b) for b in points] for a in points]
    means = [math.fsum(row) / n for row in D]
    total = math.fsum(means) / n
    return D, [[D[i][j] - means[i] - means[j] + total for j in range(n)] for i in range(n)]


def inner(A: list[list[float]], B: list[list[float]]) -> float:
    return math.fsum(a * b for left, right in zip(A, B, strict=True) for a, b in zip(left, right, strict=True))


def written_out(x: Tensor, y: Tensor) -> float:
    A, B = exact_matrices(x)[1], exact_matrices(y)[1]
    norms = inner(A, A) * inner(B, B)
    return inner(A, B) / math.sqrt(norms) if norms else 0.0


@pytest.fixture(scope="module")
def published() -> Oracle:
    """dcor's own implementation. The first import in an environment compiles for some twenty seconds, the next ones do not."""
    import dcor

    def oracle(x: Tensor, y: Tensor) -> float:
        return float(dcor.distance_correlation_sqr(x.double().numpy(), y.double().numpy(), method="naive"))

    return oracle


def tolerance(x: Tensor, y: Tensor, dtype: torch.dtype) -> float:
    """How far rounding may take dCor, to first order.

    Standardising, a difference and its norm, and the centring are some 8 roundings an entry of D, and the norm adds p
    products: (8 + √p)·eps of ‖D‖, with independent errors. Relative to ‖A‖, which is smaller, it is that much more;
    dcor sums D without centring it first, so that its cancellation costs the square of ‖D‖/‖A‖.
    """
    terms = 0.0
    for side in (x, y):
        D, A = exact_matrices(side)
        norm = inner(A, A)
        terms += (8 + math.sqrt(side.shape[1])) * (inner(D, D) / norm if norm else 0.0)
    return terms * torch.finfo(dtype).eps


# ---- against the twins ----------------------------------------------------------------------------------------------


@given(n=st.integers(1, 12), p=st.integers(1, 7), q=st.integers(1, 7), seed=SEEDS, repeats=st.data())
def test_it_equals_both_twins_over_shapes(
    n: int, p: int, q: int, seed: int, repeats: st.DataObject, published: Oracle
) -> None:
    """Some rows occur more than once, on one side or on both."""
    places = st.lists(st.integers(0, n - 1), min_size=n, max_size=n)
    x, y = rows(n, p, seed)[repeats.draw(places)], rows(n, q, seed + 1)[repeats.draw(places)]
    bound = tolerance(x, y, torch.float64)
    assert value(x, y) == pytest.approx(written_out(x, y), rel=0, abs=bound)
    assert value(x, y) == pytest.approx(published(x, y), rel=0, abs=bound)
    assert 0 <= value(x, y) <= 1


@given(n=st.integers(2, 12), p=st.integers(1, 40), seed=SEEDS)
def test_float32_is_off_by_its_roundings_only(n: int, p: int, seed: int, published: Oracle) -> None:
    x, y = rows(n, p, seed, torch.float32), rows(n, 3, seed + 1, torch.float32)
    assert distance_correlation(x, y).dtype == torch.float32
    assert value(x, y) == pytest.approx(published(x, y), rel=0, abs=tolerance(x, y, torch.float32))


def test_a_wide_sample_of_many_rows(published: Oracle) -> None:
    x = rows(64, 50)
    y = x[:, :5].square() + rows(64, 5, 1)
    bound = tolerance(x, y, torch.float64)
    assert value(x, y) == pytest.approx(published(x, y), rel=0, abs=bound)
    assert value(x, y) == pytest.approx(written_out(x, y), rel=0, abs=bound)


def test_the_twins_are_not_the_other_estimates(published: Oracle) -> None:
    """The square root and the unbiased estimate are other numbers, so that agreement above means something."""
    x, y = rows(9, 2), rows(9, 2, 1)
    A, B = (np.array(exact_matrices(side)[0]) for side in (x, y))
    off = ~np.eye(9, dtype=bool)
    centred = [D - D.sum(0) / 7 - D.sum(1, keepdims=True) / 7 + D.sum() / 56 for D in (A, B)]
    unbiased = (centred[0] * centred[1])[off].sum() / np.sqrt(np.prod([(U[off] ** 2).sum() for U in centred]))
    assert abs(value(x, y) - unbiased) > 0.1
    assert abs(value(x, y) - math.sqrt(published(x, y))) > 0.1


# ---- what it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_determines_the_other_gives_one(dtype: torch.dtype) -> None:
    x = rows(50, 4, dtype=dtype)
    turn = torch.linalg.qr(rows(4, 4, 1, dtype)).Q
    for y in (x, 3 * x + 5, x @ turn, -x):
        assert value(x, y) == pytest.approx(1, abs=tolerance(x, y, dtype))
    assert value(x, x.square()) < 0.5  # dependent, and yet far from a rotation


def test_independent_rows_stay_under_the_bound_of_the_test_of_independence() -> None:
    """n·dCov²/S exceeds the χ²₁ quantile 15.14 with a chance below 1e-4 (Székely, Rizzo and Bakirov 2007, Theorem 6)."""
    x, y = rows(400, 1), rows(400, 1, 1)

    def limit(left: Tensor, right: Tensor) -> float:
        means, norms = 1.0, 1.0
        for D in (torch.cdist(left, left), torch.cdist(right, right)):
            A = D - D.mean(0) - D.mean(1, keepdim=True) + D.mean()
            means, norms = means * float(D.mean()), norms * float(A.norm()) / len(D)
        return 15.14 * means / (norms * len(left))

    assert 0 < value(x, y) < limit(x, y) < 0.15
    x = torch.cat([x, -x])
    dependent = x.square()
    assert float((x * dependent).sum().abs()) < 1e-10  # no correlation, and yet
    assert value(x, dependent) > limit(x, dependent)


@given(n=st.integers(2, 10), seed=SEEDS)
def test_it_is_symmetric_and_knows_no_order_of_pairs(n: int, seed: int) -> None:
    x, y = rows(n, 3, seed), rows(n, 2, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    bound = 2 * tolerance(x, y, torch.float64)
    assert value(y, x) == pytest.approx(value(x, y), rel=0, abs=bound)
    assert value(x[order], y[order]) == pytest.approx(value(x, y), rel=0, abs=bound)


# ---- scales and edges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("exponent", [-99, -66, -20, 20, 66, 120])
def test_a_power_of_two_changes_nothing_but_the_gradients_scale(dtype: torch.dtype, exponent: int) -> None:
    """2⁻⁹⁹ … 2¹²⁰ covers 1e-20 … 1e20, and more; scaling by it is exact, so the result is the same to the bit."""
    x, y = rows(20, 5, dtype=dtype), rows(20, 4, 1, dtype)
    scale = 2.0**exponent
    assert value(x * scale, y) == value(x, y)
    assert value(x, y * scale) == value(x, y)
    scaled, plain = gradients(x * scale, y), gradients(x, y)
    # Above 2¹⁰⁰ a float32 gradient may be denormal: it keeps its absolute accuracy alone.
    torch.testing.assert_close(scaled[0], plain[0] / scale, rtol=torch.finfo(dtype).eps, atol=2.0**-149)
    torch.testing.assert_close(scaled[1], plain[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e30])
def test_extreme_scales_on_both_sides(dtype: torch.dtype, scale: float) -> None:
    x, y = rows(20, 5, dtype=dtype), rows(20, 4, 1, dtype)
    assert value(x * scale, y / scale) == pytest.approx(value(x, y), rel=0, abs=2 * tolerance(x, y, dtype))
    assert all(bool(each.isfinite().all()) for each in gradients(x * scale, y / scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_numbers_of_a_dtype(dtype: torch.dtype) -> None:
    """They spread by more than the dtype can say."""
    x, y = rows(20, 5, dtype=dtype), rows(20, 4, 1, dtype)
    largest = x / x.abs().amax() * (torch.finfo(dtype).max * 0.99)
    assert bool((largest - largest[:, None]).isinf().any())
    assert value(largest, y) == pytest.approx(value(x, y), rel=0, abs=2 * tolerance(x, y, dtype))


@given(seed=SEEDS, column=st.sampled_from([0.0, 1.0, -1e10, 1e20, 1e30]))
def test_what_all_rows_share_costs_nothing(seed: int, column: float) -> None:
    """Columns that are the same in all rows, however large, leave the others' distances as they are."""
    x, y = rows(10, 3, seed, torch.float32), rows(10, 3, seed + 1, torch.float32)
    wide = torch.cat([x, torch.tensor([[0.1, 0.3, 1.0]]).mul(column).expand(10, 3)], 1)
    assert value(wide, y) == pytest.approx(value(x, y), rel=0, abs=2 * tolerance(wide, y, torch.float32))


@pytest.mark.parametrize("scale", [1e-10, 1e-14, 1e-18, 1e-20, 1e-25])
def test_what_all_rows_share_never_overflows(scale: float) -> None:
    """Up to 1e38 times the spread it costs nothing; beyond, the rows count as equal."""
    x, y = rows(10, 3, 0, torch.float32), rows(10, 3, 1, torch.float32)
    wide = torch.cat([x * scale, torch.full((10, 1), 3e20)], 1)
    expected = value(x, y) if scale * 1e38 > 3e20 else 0.0
    assert value(wide, y) == pytest.approx(expected, rel=0, abs=2 * tolerance(x, y, torch.float32))
    assert all(bool(each.isfinite().all()) for each in gradients(wide, y))


def test_one_outlying_row_does_not_blur_the_others() -> None:
    """The first token's state is often thousands of times longer than the others': their gradients keep their digits."""
    x, y = rows(12, 6, dtype=torch.float32), rows(12, 6, 1, torch.float32)
    x[0] *= 1e3
    for single, double in zip(gradients(x, y), gradients(x.double(), y.double()), strict=True):
        error = (single.double() - double).norm(dim=1) / double.norm(dim=1)
        assert float(error.max()) < 1e3 * 12 * torch.finfo(torch.float32).eps  # relative to each row's own gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("filler", [0.0, 0.1, -3.7e4])
def test_equal_rows_give_zero_and_no_gradient(n: int, filler: float, dtype: torch.dtype) -> None:
    """0.1 and its kind do not average to themselves: equality must not depend on what a mean is rounded to."""
    equal, other = torch.full((n, 3), filler, dtype=dtype), rows(n, 2, dtype=dtype)
    for x, y in ((equal, other), (other, equal), (equal, equal)):
        assert value(x, y) == 0
        for gradient in gradients(x, y):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_two_distinct_rows_always_give_one() -> None:
    """Two points are a scaled and moved copy of any other two: nothing can be learnt from so few."""
    assert value(rows(2, 3), rows(2, 5, 1)) == pytest.approx(1, abs=1e-15)
    assert all(float(each.norm()) < 1e-14 for each in gradients(rows(2, 3), rows(2, 5, 1)))


def test_a_spread_below_what_has_a_finite_gradient_counts_as_none() -> None:
    x, y = rows(6, 2, dtype=torch.float32), rows(6, 2, 1, torch.float32)
    edge = torch.finfo(torch.float32).tiny / torch.finfo(torch.float32).eps
    assert value(x * edge * 4, y) > 0
    assert all(bool(each.isfinite().all()) for each in gradients(x * edge * 4, y))
    for scale in (edge / 10, 1e-44):
        assert value(x * scale, y) == 0
        assert all(bool(each.isfinite().all()) for each in gradients(x * scale, y))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    x = rows(5, 2)
    x[3, 1] = bad
    assert math.isnan(value(x, rows(5, 2, 1)))
    assert math.isnan(value(rows(5, 2, 1), x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x, y = rows(30, 8, dtype=dtype), rows(30, 8, 1, torch.float32)
    assert distance_correlation(x, y).dtype == torch.float32
    assert value(x, y) == value(x.float(), y)
    assert gradients(x, y)[0].dtype == dtype


# ---- gradients ------------------------------------------------------------------------------------------------------


@given(n=st.integers(3, 7), p=st.integers(1, 4), q=st.integers(1, 4), seed=SEEDS)
def test_gradients_equal_finite_differences(n: int, p: int, q: int, seed: int) -> None:
    """Centre and scale count as constants: that this is exact is shown here, as differences move them."""
    x, y = rows(n, p, seed).requires_grad_(), rows(n, q, seed + 1).requires_grad_()
    assert torch.autograd.gradcheck(distance_correlation, (x, y))


def test_the_gradient_is_right_where_some_rows_coincide() -> None:
    """Two equal rows moved together: their distance stays 0, and the sum of their gradients is the slope of that."""
    base, y = rows(6, 2), rows(7, 3, 1)

    def shared(x: Tensor) -> Tensor:
        return distance_correlation(torch.cat([x, x[:1]]), y)

    assert torch.autograd.gradcheck(shared, (base.requires_grad_(),))


def test_descent_on_one_side_lowers_it() -> None:
    x = rows(40, 3)
    y = (x + 0.1 * rows(40, 3, 1)).requires_grad_()
    before = value(x, y.detach())
    optimizer = torch.optim.Adam([y], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        distance_correlation(x, y).backward()
        optimizer.step()
    assert before > 0.9
    assert value(x, y.detach()) < before / 5


# ---- sampling -------------------------------------------------------------------------------------------------------


@given(mask=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5), limit=st.integers(1, 30))
def test_a_sample_is_of_distinct_places_in_the_mask(mask: list[list[bool]], limit: int) -> None:
    for kind in (torch.bool, torch.int64, torch.float32):
        drawn = sample_rows(torch.tensor(mask).to(kind), limit, torch.Generator().manual_seed(1)).tolist()
        flat = [5 * i + j for i, row in enumerate(mask) for j, kept in enumerate(row) if kept]
        assert drawn == sorted(set(drawn))
        assert set(drawn) <= set(flat)
        assert len(drawn) == min(limit, len(flat))


def test_every_place_is_as_likely_as_any_other() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6)
    for _ in range(2000):
        counts[sample_rows(mask, 2, generator)] += 1
    # Binomial(2000, 2/5): standard deviation 21.9; five of them.
    assert counts[2] == 0
    assert bool(((counts - 800).abs() < 110)[mask.bool()].all())


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="limit of 0"):
        sample_rows(torch.ones(3), 0, torch.Generator())


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"alpha": 2.0}, [2, 2, 2, 2, 2, 2]),
        ({"alpha": 2.0, "schedule": "linear", "warmup_steps": 4}, [0.5, 1, 1.5, 2, 2, 2]),
        ({"alpha": 2.0, "schedule": "linear", "warmup_steps": 1}, [2, 2, 2, 2, 2, 2]),
        ({}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_weight_follows_its_schedule(options: dict[str, object], weights: list[float]) -> None:
    assert [DecorrelationOptions.model_validate(options).alpha_at(step) for step in range(6)] == weights


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"alpha": -1}, "alpha = -1: "),
        ({"alpha": "nan"}, "alpha = "),
        ({"samples": 1}, "samples = 1: "),
        ({"samples": 5000}, "samples = 5000: "),
        ({"schedule": "cosine"}, "schedule = 'cosine': "),
        ({"schedule": "linear"}, "warmup_steps above 0 belongs to schedule = 'linear'"),
        ({"warmup_steps": 3}, "warmup_steps above 0 belongs to schedule = 'linear'"),
        ({"alfa": 1}, "unknown key 'd.alfa'"),
    ],
)
def test_options_that_make_no_sense_are_refused(table: dict[str, object], said: str) -> None:
    raw = {"design": "d", "model": "m", "output": "o", "d": table}
    with pytest.raises(ConfigError) as caught:
        load_config(raw, options={"d": DecorrelationOptions})
    assert said in caught.value.message
    assert caught.value.hint


# ---- as a regulariser -----------------------------------------------------------------------------------------------


def batch(seed: int = 0, *, requires_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, hidden states and mask of 3 sequences of 10, 8 and 4 tokens."""
    embeddings, hidden = rows(30, 4, seed).view(3, 10, 4), rows(30, 6, seed + 1).view(3, 10, 6)
    mask = torch.arange(10).lt(torch.tensor([[10], [8], [4]])).long()
    return embeddings.requires_grad_(requires_grad), hidden.requires_grad_(requires_grad), mask


def rows_used(regulariser: Decorrelation) -> list[int]:
    embeddings, hidden, mask = batch(requires_grad=True)
    regulariser.penalty(embeddings, hidden, mask).backward()
    assert hidden.grad is not None
    return hidden.grad.flatten(0, 1).abs().sum(1).nonzero().squeeze(1).tolist()


def test_the_penalty_is_the_weighted_value_of_the_tokens_that_are_not_padding() -> None:
    embeddings, hidden, mask = batch()
    regulariser = Decorrelation(DecorrelationOptions(alpha=3.0), seed=1)
    kept = mask.flatten().bool()
    expected = value(embeddings.flatten(0, 1)[kept], hidden.flatten(0, 1)[kept])
    assert regulariser.last is None
    assert float(regulariser.penalty(embeddings, hidden, mask)) == 3 * expected
    assert regulariser.last == expected
    embeddings[mask == 0], hidden[mask == 0] = 1e30, math.nan
    assert float(regulariser.penalty(embeddings, hidden, mask)) == 3 * expected
    hidden[2, 3] += 1
    assert float(regulariser.penalty(embeddings, hidden, mask)) != 3 * expected


def test_no_more_rows_are_compared_than_asked_for() -> None:
    used = rows_used(Decorrelation(DecorrelationOptions(alpha=1.0, samples=5), seed=1))
    assert len(used) == 5
    assert set(used) <= set(batch()[2].flatten().nonzero().squeeze(1).tolist())
    assert len(rows_used(Decorrelation(DecorrelationOptions(alpha=1.0, samples=30), seed=1))) == 22


def test_long_sequences_take_memory_for_the_sample_alone() -> None:
    """All pairs of 200,000 tokens would take 160 GB."""
    embeddings, hidden = rows(200_000, 1).view(1, -1, 1), rows(200_000, 1, 1).view(1, -1, 1)
    regulariser = Decorrelation(DecorrelationOptions(alpha=1.0, samples=64), seed=1)
    assert 0 < float(regulariser.penalty(embeddings, hidden, torch.ones(1, 200_000))) < 1


def test_the_sample_follows_from_seed_step_and_micro_batch() -> None:
    options = DecorrelationOptions(alpha=1.0, samples=5)
    whole = Decorrelation(options, seed=1)
    samples = []
    for _ in range(3):
        samples += [rows_used(whole), rows_used(whole)]
        whole.advance()
    assert whole.step == 3
    assert len({tuple(sample) for sample in samples}) == 6
    resumed = Decorrelation(options, seed=1)
    resumed.start_at(2)
    assert [rows_used(resumed), rows_used(resumed)] == samples[4:]
    assert rows_used(Decorrelation(options, seed=2)) != samples[0]


def test_the_micro_batches_of_a_step_share_its_weight() -> None:
    regulariser = Decorrelation(DecorrelationOptions(alpha=8.0, schedule="linear", warmup_steps=4), seed=1)
    full = Decorrelation(DecorrelationOptions(alpha=1.0), seed=1)
    for weight in (2, 4, 6, 8, 8):
        for seed in (0, 5):
            penalty, plain = (float(each.penalty(*batch(seed))) for each in (regulariser, full))
            assert penalty == pytest.approx(weight * plain, rel=1e-15)
        regulariser.advance()
        full.advance()


def test_without_weight_nothing_is_computed_and_the_loss_keeps_its_bits() -> None:
    embeddings, hidden, mask = batch(requires_grad=True)
    regulariser = Decorrelation(DecorrelationOptions(), seed=1)
    loss = hidden.square().sum()
    with mock.patch("veiltune.privacy.decorrelation.distance_correlation", side_effect=AssertionError):
        penalty = regulariser.penalty(embeddings, hidden, mask)
    assert torch.equal(loss + penalty, loss)
    assert not penalty.requires_grad
    assert regulariser.last is None


def test_a_batch_of_padding_or_of_one_token_bears_no_penalty() -> None:
    embeddings, hidden, mask = batch(requires_grad=True)
    for kept in (0, 1):
        mask[:] = 0
        mask[0, :kept] = 1
        penalty = Decorrelation(DecorrelationOptions(alpha=1.0), seed=1).penalty(embeddings, hidden, mask)
        penalty.backward()
        assert float(penalty.detach()) == 0
        assert hidden.grad is not None
        assert not hidden.grad.any()


def test_training_a_layer_with_it_decorrelates_what_the_layer_sends() -> None:
    """Without it the same layer, trained for the same task, sends what its input was."""

    def after(alpha: float) -> tuple[float, float]:
        torch.manual_seed(0)
        embeddings = torch.randn(4, 32, 4)
        target = embeddings[..., :1]
        layer, head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
        optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=0.05)
        regulariser = Decorrelation(DecorrelationOptions(alpha=alpha, samples=64), seed=1)
        for _ in range(80):
            hidden = layer(embeddings)
            task = (head(hidden) - target).square().mean()
            optimizer.zero_grad()
            (task + regulariser.penalty(embeddings, hidden, torch.ones(4, 32))).backward()
            optimizer.step()
            regulariser.advance()
        return value(embeddings.flatten(0, 1), layer(embeddings).flatten(0, 1).detach()), float(task.detach())

    (exposed, plain_task), (protected, protected_task) = after(0.0), after(1.0)
    assert exposed > 0.6
    assert protected < exposed - 0.2
    assert max(plain_task, protected_task) < 0.05  # one coordinate of four suffices for the task
