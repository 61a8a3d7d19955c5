"""Masking keys: each fast path against a written-out matrix, Haar measure, error bounds from both sides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veiltune.errors import ConfigError
from veiltune.privacy import orthogonal
from veiltune.privacy.bounds import error_bound, product_bound
from veiltune.privacy.orthogonal import KEY_KINDS, ButterflyKey, Key, make_key
from veiltune.secrets import MasterSecret

SECRET = MasterSecret.for_tests(7)
ORTHOGONAL_KINDS = ["orthogonal", "butterfly"]


def key_of(kind: str, dim: int = 24, label: str = "k", kappa: float = 16.0) -> Key:
    return make_key(kind, dim, SECRET, label, kappa if kind == "conditioned" else None)


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor, condition_number: float = 1.0) -> None:
    """Equal up to a few roundings: the bound of one product, relative to the largest entry."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = product_bound(actual.shape[-1] + 24, condition_number, torch.finfo(actual.dtype).eps)
    assert float((actual - expected).abs().max()) <= bound * float(expected.abs().max())


# ---- against the written-out matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEY_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_method_equals_its_formula(kind: str, dtype: torch.dtype) -> None:
    key, x, w, v = key_of(kind), rows(3, 5, 24, dtype=dtype), rows(24, 7, dtype=dtype), rows(7, 24, dtype=dtype)
    kappa = key.condition_number**2  # the twin inverts R by LU, which costs one κ; the product costs another
    matrix = key.matrix()
    inverse = torch.linalg.inv(matrix)
    assert matrix.dtype == torch.float64

    def as_given(exact: Tensor) -> Tensor:
        return exact.to(dtype)

    close(key.mask(x), as_given(x.double() @ matrix), kappa)
    close(key.unmask(x), as_given(x.double() @ inverse), kappa)
    close(key.mask_gradient(x), as_given(x.double() @ inverse.T), kappa)
    close(key.unmask_gradient(x), as_given(x.double() @ matrix.T), kappa)
    close(key.mask_input_weight(w), as_given(inverse @ w.double()), kappa)
    close(key.unmask_input_weight(w), as_given(matrix @ w.double()), kappa)
    close(key.mask_output_weight(v), as_given(v.double() @ matrix), kappa)
    close(key.unmask_output_weight(v), as_given(v.double() @ inverse), kappa)


def test_a_butterfly_equals_its_factors_written_out() -> None:
    key = ButterflyKey(12, SECRET, "b")
    assert key.factors == (3, 4)
    first, inner, outer, last = key._exact()[:4]
    eye = torch.eye(12, dtype=torch.float64)
    transpose = eye[torch.arange(12).view(3, 4).T.flatten()].T
    slow = eye[first].T @ torch.block_diag(*inner) @ transpose @ torch.block_diag(*outer) @ eye[last].T
    close(key.matrix(), slow)
    assert float(key.matrix().abs().min()) > 0  # every output depends on every input


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(ORTHOGONAL_KINDS), half=st.integers(2, 30), batch=st.lists(st.integers(0, 4), max_size=3))
def test_orthogonal_kinds_are_orthogonal_for_any_shape(kind: str, half: int, batch: list[int]) -> None:
    key = key_of(kind, 2 * half)
    close(key.matrix() @ key.matrix().T, torch.eye(2 * half, dtype=torch.float64))
    x = rows(*batch, 2 * half)
    assert key.mask(x).shape == x.shape
    torch.testing.assert_close(key.unmask(key.mask(x)), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(key.mask(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    assert x.numel() == 0 or float((key.mask(x) - x).abs().max()) > 1e-3


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_masking_is_differentiable_and_its_gradients_are_the_gradient_methods(kind: str) -> None:
    key, x, g = key_of(kind), rows(4, 24).requires_grad_(), rows(4, 24, seed=1)
    for method, back in ((key.mask, key.unmask_gradient), (key.unmask, key.mask_gradient)):
        (gradient,) = torch.autograd.grad(method(x), x, g)
        close(gradient, back(g), key.condition_number)
    assert torch.autograd.gradcheck(key.mask, (x,))
    assert torch.autograd.gradgradcheck(lambda y: key.mask(y).pow(3), (x,))


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_the_protected_product_and_its_gradient_are_the_plain_ones(kind: str) -> None:
    key = key_of(kind)
    x, w = rows(6, 24).requires_grad_(), rows(24, 9)
    plain = x @ w
    masked = key.mask(x.detach()).requires_grad_()
    protected = masked @ key.mask_input_weight(w)
    close(protected.detach(), plain.detach(), key.condition_number)
    upstream = rows(6, 9, seed=2)
    (expected,) = torch.autograd.grad(plain, x, upstream)
    (returned,) = torch.autograd.grad(protected, masked, upstream)
    close(key.unmask_gradient(returned), expected, key.condition_number)
    assert float((returned - expected).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_weights_in_chunks_and_any_layout_equal_weights_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key, w = key_of(kind), rows(24, 11, dtype=torch.float32)
    whole = key.mask_input_weight(w), key.mask_output_weight(w.T)
    monkeypatch.setattr(orthogonal, "_CHUNK_ELEMENTS", 100)  # four rows at a time
    for weight in (w, w.T.contiguous().T):
        close(key.mask_input_weight(weight), whole[0])
        close(key.mask_output_weight(weight.T), whole[1])
    assert key.mask_input_weight(w).stride() == w.stride()


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_half_precision_weights_are_rounded_once(kind: str) -> None:
    key, w = key_of(kind), rows(24, 11).bfloat16()
    assert torch.equal(key.mask_input_weight(w), key.mask_input_weight(w.double()).bfloat16())


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_a_key_first_used_without_gradients_serves_with_them(kind: str) -> None:
    key, x = key_of(kind), rows(2, 24, dtype=torch.float32)
    with torch.inference_mode():
        key.mask(x)
    x.requires_grad_()
    key.mask(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_rows_of_another_length_are_refused(kind: str) -> None:
    key = key_of(kind)
    for call in (key.mask, key.unmask, key.mask_gradient, key.unmask_gradient, key.mask_output_weight):
        with pytest.raises(ValueError, match="rows of 24 numbers"):
            call(rows(2, 25))
    with pytest.raises(ValueError, match="rows of 24 numbers"):
        key.mask_input_weight(rows(25, 2))


# ---- what a key is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_a_key_depends_on_its_label_and_secret_and_on_nothing_else(kind: str) -> None:
    kappa = 16.0 if kind == "conditioned" else None
    matrix = make_key(kind, 24, SECRET, "k", kappa).matrix()
    assert torch.equal(matrix, make_key(kind, 24, MasterSecret(SECRET.reveal()), "k", kappa).matrix())
    assert not torch.allclose(matrix, make_key(kind, 24, SECRET, "l", kappa).matrix())
    assert not torch.allclose(matrix, make_key(kind, 24, MasterSecret.for_tests(8), "k", kappa).matrix())


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_a_released_key_is_derived_again(kind: str) -> None:
    key = key_of(kind)
    before = key.matrix()
    key.release()
    assert key._parts is None
    assert torch.equal(key.matrix(), before)


@pytest.mark.parametrize("kind", KEY_KINDS)
def test_the_declared_condition_number_is_the_true_one(kind: str) -> None:
    key = key_of(kind, 48)
    measured = float(torch.linalg.cond(key.matrix()))
    assert measured == pytest.approx(key.condition_number, rel=1e-9)
    assert (key.condition_number == 1.0) == (kind in ORTHOGONAL_KINDS)


def test_conditioned_singular_values_are_log_spaced_about_one() -> None:
    logarithms = torch.linalg.svdvals(key_of("conditioned", 33, kappa=100.0).matrix()).log()
    steps = logarithms[:-1] - logarithms[1:]
    torch.testing.assert_close(steps, torch.full_like(steps, math.log(100.0) / 32))
    assert float(logarithms.sum()) == pytest.approx(0.0, abs=1e-9)


def test_a_key_shows_its_kind_and_width_alone() -> None:
    for kind in KEY_KINDS:
        assert repr(key_of(kind)) == f"<Secret Key {kind} dim=24 redacted>"


def test_haar_matrices_have_the_moments_of_haar_measure() -> None:
    n, d = 2000, 4
    batch = orthogonal._haar(SECRET, "moments", n, d)
    # Each entry has mean 0 and variance 1/d; tr Q has mean 0 and variance 1; det Q is ±1 with even odds.
    assert float(batch.mean(dim=0).abs().max()) < 5 / math.sqrt(d * n)
    assert float((batch.square().mean(dim=0) - 1 / d).abs().max()) < 5 * math.sqrt(2 / n) / d
    traces = batch.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float(traces.mean())) < 5 / math.sqrt(n)
    assert abs(float(traces.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float(torch.linalg.det(batch).mean())) < 5 / math.sqrt(n)
    without_signs = torch.linalg.qr(SECRET.normal("moments/haar", (n, d, d))).Q
    assert float(without_signs.mean(dim=0).abs().max()) > 0.2


def test_butterfly_entries_have_the_variance_of_haar_measure() -> None:
    squares = torch.stack([key_of("butterfly", 12, f"b{i}").matrix().square() for i in range(400)])
    # E[R_ij²] = 1/d; R_ij is a product of two entries, so the standard deviation of R_ij² is below 3/d.
    assert float((squares.mean(dim=0) - 1 / 12).abs().max()) < 5 * 3 / 12 / math.sqrt(400)


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "conditioned"])
def test_as_many_known_pairs_as_dimensions_recover_a_dense_key_and_fewer_do_not(kind: str) -> None:
    key = key_of(kind)
    assert key.known_pairs == 24
    x = rows(24, 24)
    solved = torch.linalg.lstsq(x, key.mask(x)).solution
    torch.testing.assert_close(solved, key.matrix(), rtol=0, atol=1e-8)
    fewer = torch.linalg.pinv(x[:20]) @ key.mask(x[:20])
    assert float((fewer - key.matrix()).norm() / key.matrix().norm()) > 0.1


def test_a_butterfly_needs_fewer_known_pairs_as_its_count_says() -> None:
    key = ButterflyKey(576, SECRET, "b")
    assert key.factors == (24, 24)
    assert key.known_pairs == 24
    n, unknown = 24, 576 * (24 + 24 - 2) // 2
    assert n * 576 - n * (n + 1) // 2 >= unknown > (n - 1) * 576 - (n - 1) * n // 2


# ---- bounds ---------------------------------------------------------------------------------------------------------


def product_error(key: Key, dtype: torch.dtype) -> float:
    """The error of (X·R)·(R⁻¹·W) relative to the largest entry of X·W, in units of eps."""
    x, w = rows(64, key.dim, dtype=dtype, seed=3), rows(key.dim, 64, dtype=dtype, seed=4)
    plain = x @ w
    error = (key.mask(x) @ key.mask_input_weight(w) - plain).abs().max() / plain.abs().max()
    return float(error) / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ORTHOGONAL_KINDS)
def test_orthogonal_keys_meet_their_bound_without_being_far_below_it(kind: str, dtype: torch.dtype) -> None:
    error = product_error(key_of(kind, 768), dtype)
    assert product_bound(768, 1.0, 1.0) / 20 < error < product_bound(768, 1.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gaussian_key_breaks_the_orthogonal_bound_and_meets_its_own(dtype: torch.dtype) -> None:
    key = key_of("gaussian", 768)
    assert key.condition_number > 768
    assert product_bound(768, 1.0, 1.0) < product_error(key, dtype) < product_bound(768, key.condition_number, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_error_grows_with_the_condition_number_within_its_bound(dtype: torch.dtype) -> None:
    errors = {kappa: product_error(key_of("conditioned", 768, kappa=kappa), dtype) for kappa in (1.0, 128.0, 2048.0)}
    for kappa, error in errors.items():
        assert error < product_bound(768, kappa, 1.0)
    assert product_bound(768, 1.0, 1.0) < errors[128.0]
    assert 2 * errors[1.0] < errors[128.0] < errors[2048.0] / 2


def test_bounds_of_a_whole_pass_scale_as_they_say() -> None:
    product = product_bound(576, 1.0, 2.0**-23)
    assert error_bound("logits", product, products=4) == pytest.approx(4 * product)
    assert error_bound("loss", product, products=4, largest_logit=20.0, loss=2.0) == pytest.approx(80 * product)
    assert error_bound("gradients", product, products=1) == pytest.approx(2 * (3 + math.sqrt(2)) * product)
    with pytest.raises(ConfigError, match="'logit'") as caught:
        error_bound("logit", product, products=4)
    assert "did you mean 'logits'" in str(caught.value.hint)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dim", "kappa", "message"),
    [
        ("ortogonal", 8, None, "unknown key kind 'ortogonal'"),
        ("orthogonal", 0, None, "at least 1, got 0"),
        ("orthogonal", 8, 2.0, "takes no condition number, got 2.0"),
        ("butterfly", 8, 2.0, "takes no condition number"),
        ("butterfly", 7, None, "two factors of at least 2, got 7"),
        ("butterfly", 3, None, "two factors of at least 2, got 3"),
        ("conditioned", 8, None, "κ = None"),
        ("conditioned", 8, 0.5, "κ = 0.5"),
        ("conditioned", 8, math.inf, "κ = inf"),
        ("conditioned", 8, math.nan, "κ = nan"),
        ("conditioned", 1, 2.0, "κ = 2.0"),
    ],
)
def test_impossible_keys_are_refused_with_a_hint(kind: str, dim: int, kappa: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_key(kind, dim, SECRET, "k", kappa)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian", "conditioned"])
def test_one_dimension_is_enough_for_dense_keys(kind: str) -> None:
    key = key_of(kind, 1, kappa=1.0)
    torch.testing.assert_close(key.unmask(key.mask(rows(3, 1))), rows(3, 1))
