"""The quantised wire: bytes against a slow twin, errors against their bounds, and nothing but refusals for bad bytes."""

from __future__ import annotations

import hashlib
import math
import random
import struct
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from veiltune.errors import ConfigError, ProtocolError, TrainingError
from veiltune.privacy import quantisation
from veiltune.privacy.error_feedback import ErrorFeedback
from veiltune.privacy.quantisation import Bits, WireCodec, WireOptions
from veiltune.privacy.rotation import LARGEST_FACTOR, _rotation, rotate, unrotate

BITS: tuple[Bits, ...] = (32, 16, 8, 4)
HALVES: tuple[Literal["float16", "bfloat16"], ...] = ("float16", "bfloat16")
EPS = torch.finfo(torch.float32).eps
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outliers(*shape: int, seed: int = 0) -> Tensor:
    """Rows of log-normal channels of which three are sixty times larger, as hidden states are."""
    x = drawn(*shape, seed=seed) * drawn(shape[-1], seed=1).exp()
    x[..., [5, 17, 40]] *= 60
    return x


def relative_error(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float((x - y).norm() / x.norm())


def codec_of(bits: Bits, **options: Any) -> WireCodec:
    return WireCodec(bits, WireOptions(**options), what="activations")


def loop(codec: WireCodec, x: Tensor, *, starts: bool = True) -> Tensor:
    y = codec.decode(codec.encode(x, starts=starts))
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    return y


# ---- the rotation ------------------------------------------------------------------------------------------------------


def written_out(dim: int, factors: list[int]) -> np.ndarray:
    """S·(F₁ ⊗ … ⊗ F_k) from the definitions, entry by entry."""
    matrix = np.ones((1, 1))
    for order in factors:
        two = order & -order
        odd = order // two
        hadamard = [[(-1) ** (i & j).bit_count() / math.sqrt(two) for j in range(two)] for i in range(two)]
        cosine = [
            [
                math.sqrt((1 if k == 0 else 2) / odd) * math.cos(math.pi * (2 * i + 1) * k / (2 * odd))
                for i in range(odd)
            ]
            for k in range(odd)
        ]
        matrix = np.kron(matrix, np.kron(hadamard, cosine))
    text = hashlib.shake_256(b"veiltune rotation 1 first %d" % dim).digest(-(-dim // 8))
    signs = [1 - 2 * (text[i // 8] >> (i % 8) & 1) for i in range(dim)]
    return np.diag(signs) @ matrix


@pytest.mark.parametrize("factors", [[1], [2], [12], [9, 64], [2, 64], [2, 35, 64]], ids=str)
def test_the_rotation_is_its_definition(factors: list[int]) -> None:
    dim = math.prod(factors)
    actual_factors = [len(factor) for factor in _rotation(dim, torch.float64, torch.device("cpu")).factors]
    assert actual_factors == factors
    if dim <= 600:
        actual = rotate(torch.eye(dim, dtype=torch.float64))
        np.testing.assert_allclose(actual.numpy(), written_out(dim, factors), rtol=0, atol=1e-14)


@given(dim=st.one_of(st.integers(1, 300), st.sampled_from([67, 131, 576, 1009])), batch=st.lists(st.integers(0, 3)))
def test_the_rotation_is_orthogonal_for_any_width_and_batch(dim: int, batch: list[int]) -> None:
    x = drawn(*batch[:3], dim, dtype=torch.float64)
    y = rotate(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(unrotate(y), x, rtol=0, atol=1e-13)
    assert dim < 3 or x.numel() == 0 or float((y - x).abs().max()) > 1e-3


@pytest.mark.parametrize("dim", [64, 67, 576, 768, 1600, 4096])
def test_the_inverse_rotation_is_exact_to_rounding_and_no_channel_keeps_its_outlier(dim: int) -> None:
    x = drawn(20, dim)
    # Each factor rounds every coordinate by at most its order times eps of the row's norm; typically by far less.
    passes = _rotation(dim, torch.float32, torch.device("cpu"))
    bound = 2 * len(passes.signs) * sum(len(factor) for factor in passes.factors) * EPS
    error = ((unrotate(rotate(x)) - x).norm(dim=-1) / x.norm(dim=-1)).max()
    assert 0 < float(error) < bound
    odd = sum(len(factor) & (len(factor) - 1) != 0 for factor in passes.factors)
    peaks = rotate(torch.eye(dim, dtype=torch.float64)).abs().amax(-1) if dim <= 1600 else torch.zeros(1)
    per_pass = math.sqrt(2**odd / passes.width) * (1 + 1e-9)
    # A second pass leaves the channels it does not cover as the first made them, and mixes d coordinates of the others.
    assert float(peaks.max()) < (per_pass if len(passes.signs) == 1 else 0.5)


def test_a_large_prime_width_takes_little_memory() -> None:
    rotation = _rotation(1_000_003, torch.float32, torch.device("cpu"))
    assert rotation.width > 990_000
    assert all(len(factor) <= LARGEST_FACTOR for factor in rotation.factors)


def test_the_rotation_is_differentiable_even_if_first_used_without_gradients() -> None:
    x = drawn(3, 77, dtype=torch.float64)
    with torch.inference_mode():
        rotate(x.clone())
    (gradient,) = torch.autograd.grad(rotate(x.requires_grad_()), x, torch.ones(3, 77, dtype=torch.float64))
    torch.testing.assert_close(gradient, unrotate(torch.ones(3, 77, dtype=torch.float64)))


# ---- bytes against the slow twin ---------------------------------------------------------------------------------------


def slow_group(y: np.ndarray, largest: int, *, search: bool) -> tuple[int, list[int]]:
    """The bits of a bfloat16 scale, and the integers, of one group: number by number."""

    def scale_above(value: np.float32) -> int:
        bits = int(np.float32(value).view(np.uint32))
        return (bits >> 16) + (bits & 0xFFFF != 0)

    def rounded(bits: int) -> tuple[float, list[int]]:
        scale = np.uint32(bits << 16).view(np.float32)
        numbers = [max(-largest, min(largest, round(float(v / scale)))) if scale else 0 for v in y]
        return sum((float(v) - float(scale) * n) ** 2 for v, n in zip(y, numbers, strict=True)), numbers

    full = scale_above(np.abs(y).max() / np.float32(largest))
    above = np.uint32(full << 16).view(np.float32)
    candidates = [full, *(scale_above(above * np.float32(clip)) for clip in quantisation._CLIPS if search)]
    best = min(candidates, key=lambda bits: rounded(bits)[0])
    return best, rounded(best)[1]


def slow_bytes(x: Tensor, bits: int, options: WireOptions) -> bytes:
    """The frame of (batch, length, d) in float32, as the module's docstring describes it."""
    batch, length, d = x.shape
    apart = options.first_position == "half"
    frame = struct.pack("<2sBBBBhI", b"VQ", 1, bits, options.rotate + 2 * apart, 3, 0, options.group or d)
    frame += struct.pack("<3I", batch, length, d)
    scales, numbers = b"", []
    for sequence in x:
        for position, row in enumerate(sequence):
            if apart and position == 0:
                frame += row.bfloat16().view(torch.uint8).numpy().tobytes()
                continue
            y = (rotate(row) if options.rotate else row).numpy().reshape(-1, options.group or d)
            for group in y:
                scale, integers = slow_group(group, 127 if bits == 8 else 7, search=bits == 4)
                scales += struct.pack("<H", scale)
                numbers += integers
    if bits == 8:
        return frame + scales + struct.pack(f"{len(numbers)}b", *numbers)
    numbers += [0] * (len(numbers) % 2)
    return frame + scales + bytes(low + 8 | high + 8 << 4 for low, high in zip(*[iter(numbers)] * 2, strict=True))


@pytest.mark.parametrize("first", ["half", "quantised"])
@pytest.mark.parametrize(
    ("rotated", "group", "d"), [(False, None, 24), (False, 8, 24), (True, None, 27), (True, 9, 27)]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_frame_is_that_of_the_slow_twin(
    bits: Bits, rotated: bool, group: int | None, d: int, first: Literal["half", "quantised"]
) -> None:
    options = WireOptions(rotate=rotated, group=group, first_position=first)
    x = drawn(3, 4, d).pow(3)
    x[1, 2] = 0
    if rotated:  # one row at a time or all at once, the rotation may round differently: take numbers it does not round
        x = unrotate((rotate(x) * 1024).round()) / 1024
    fast = bytes(WireCodec(bits, options).encode(x).tolist())
    slow = slow_bytes(x, bits, options)
    differing = sum(a != b for a, b in zip(fast, slow, strict=True))
    assert differing <= (2 if rotated else 0)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    bits=st.sampled_from(BITS),
    dtype=st.sampled_from(DTYPES),
    half=st.sampled_from(HALVES),
    rotated=st.booleans(),
    starts=st.booleans(),
    log_scale=st.integers(-4, 4),
)
def test_shape_and_dtype_return_and_errors_are_within_their_bounds(
    shape: list[int],
    bits: Bits,
    dtype: torch.dtype,
    half: Literal["float16", "bfloat16"],
    rotated: bool,
    starts: bool,
    log_scale: int,
) -> None:
    x = drawn(*shape, dtype=dtype) * 10.0**log_scale
    codec = codec_of(bits, half=half, rotate=rotated)
    y = loop(codec, x, starts=starts)
    if bits == 32:
        assert torch.equal(x, y)
        return
    d = shape[-1]
    # In units of a row's largest magnitude: half a rounding of each format, then of the source dtype, then of the rotation.
    half_unit = {16: 2.0**-8 / math.sqrt(d), 8: 0.5 / 127 * 1.01, 4: 0.5 / 7 * 1.01}[bits]
    row = x.double().reshape(-1, d).norm(dim=-1)
    bound = row * (half_unit * math.sqrt(d) + torch.finfo(dtype).eps + 100 * EPS)
    if dtype == torch.float16:
        bound = bound + 6e-8 * math.sqrt(d)  # its subnormals
    assert bool(((x.double() - y.double()).reshape(-1, d).norm(dim=-1) <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_precision_is_bit_for_bit(dtype: torch.dtype) -> None:
    finfo = torch.finfo(dtype)
    x = torch.tensor([[0.0, -0.0, finfo.max, finfo.min, finfo.tiny, finfo.smallest_normal / 4]], dtype=dtype)
    payload = codec_of(32).encode(x)
    assert len(payload) == 20 + 6 * dtype.itemsize
    assert torch.equal(codec_of(32).decode(payload).view(torch.uint8), x.view(torch.uint8))


def test_sixteen_bits_are_the_rounding_to_half_and_float16_is_scaled() -> None:
    x = drawn(2, 5, 12)
    assert torch.equal(loop(codec_of(16), x), x.bfloat16().float())
    assert torch.equal(loop(codec_of(16, half="float16"), x), x.half().float())
    for factor in (2.0**-40, 2.0**100):  # gradients and outliers that float16 itself would lose
        assert torch.equal(loop(codec_of(16, half="float16"), x * factor), x.half().float() * factor)
        assert not torch.equal((x * factor).half().float(), x.half().float() * factor)
    assert torch.equal(loop(codec_of(16, half="float16"), torch.zeros(2, 3)), torch.zeros(2, 3))


# ---- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_no_coordinate_is_off_by_more_than_half_a_scale(bits: Bits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "_CLIPS", ())
    x, largest = outliers(4, 6, 64), {8: 127, 4: 7}[bits]
    codec = codec_of(bits, group=16, first_position="quantised")
    error = (rotate(loop(codec, x)) - rotate(x)).reshape(-1, 16).abs().amax(-1)
    scale = rotate(x).reshape(-1, 16).abs().amax(-1) / largest
    in_scales = error / scale
    assert float(in_scales.max()) <= 0.5 * (1 + 2.0**-7) + 128 * 100 * EPS  # a scale is rounded up by at most 2^-7
    assert float(in_scales.max()) > 0.45  # and the bound is met, so that the scale is not smaller than it says


@pytest.mark.parametrize(("bits", "with_rotation"), [(8, 0.012), (4, 0.14)])
def test_the_rotation_keeps_outlier_channels_from_owning_the_scale(bits: Bits, with_rotation: float) -> None:
    x = outliers(4, 32, 576)
    rotated, plain = (relative_error(x, loop(codec_of(bits, rotate=on), x)) for on in (True, False))
    assert rotated < with_rotation
    assert plain > 2.5 * rotated
    ordinary = drawn(4, 32, 576)  # and where there are no outliers, it changes little
    rotated, plain = (relative_error(ordinary, loop(codec_of(bits, rotate=on), ordinary)) for on in (True, False))
    assert rotated == pytest.approx(plain, rel=0.1)


def test_clipping_four_bits_never_errs_more_and_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, rotated in product((drawn(64, 576), drawn(64, 576).pow(3)), (True, False)):
        codec = codec_of(4, rotate=rotated, first_position="quantised")
        clipped = (loop(codec, x) - x).norm(dim=-1)
        with monkeypatch.context() as patch:
            patch.setattr(quantisation, "_CLIPS", ())
            unclipped = (loop(codec, x) - x).norm(dim=-1)
        assert bool((clipped <= unclipped * (1 + 100 * EPS)).all())
        if rotated:
            assert float(clipped.mean()) < 0.9 * float(unclipped.mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rotated", [True, False])
def test_the_relative_error_does_not_depend_on_the_magnitude(bits: Bits, rotated: bool) -> None:
    x, codec = drawn(3, 4, 24), codec_of(bits, rotate=rotated)
    errors = [relative_error(x * 2.0**power, loop(codec, x * 2.0**power)) for power in (-100, -30, 0, 100)]
    assert errors == pytest.approx([errors[2]] * 4, rel=1e-6)
    assert not loop(codec, x * 2.0**-124)[:, 1:].any()  # below what a bfloat16 scale can divide: zero, not NaN


@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_stay_zero(bits: Bits) -> None:
    x = drawn(3, 4, 16)
    x[1] = x[2, 3] = 0
    for stochastic in (False, True):
        y = loop(codec_of(bits, stochastic=stochastic), x)
        assert torch.equal(y.any(-1), x.any(-1))


def test_the_largest_numbers_of_a_dtype_return_finite() -> None:
    x = torch.full((2, 3, 16), 65504.0, dtype=torch.float16) * drawn(2, 3, 16).sign().half()
    for bits in (16, 8, 4):
        assert relative_error(x, loop(codec_of(bits), x)) < 0.2


# ---- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "share"), [(8, 0.263), (4, 0.14)])
@pytest.mark.parametrize("d", [64, 576])
@pytest.mark.parametrize("half", HALVES)
def test_the_bytes_are_within_their_share_of_float32(
    bits: Bits, share: float, d: int, half: Literal["float16", "bfloat16"]
) -> None:
    payload = codec_of(bits, half=half).encode(drawn(4, 128, d))
    assert bits / 32 < len(payload) / (4 * 4 * 128 * d) <= share


def test_the_exact_number_of_bytes() -> None:
    sizes = {
        (bits, group): len(codec_of(bits, group=group).encode(drawn(4, 128, 576)))
        for bits in (8, 4)
        for group in (None, 64)
    }
    header, halves = 24, 4 * 576 * 2
    rows = 4 * 127
    assert sizes[8, None] == header + halves + rows * (576 + 2)
    assert sizes[8, 64] == header + halves + rows * (576 + 2 * 9)
    assert sizes[4, None] == header + halves + rows * (288 + 2)
    assert sizes[4, 64] == header + halves + rows * (288 + 2 * 9)
    assert len(codec_of(32).encode(drawn(1, 1, 1, 1, 1))) - 4 == 32  # the longest header


# ---- the first position ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_the_first_position_crosses_in_half_and_the_rest_as_without_it(bits: Bits) -> None:
    x, codec = outliers(3, 5, 64), codec_of(bits)
    x[:, 0, 7] = 4000
    y = loop(codec, x)
    assert torch.equal(y[:, 0], x[:, 0].bfloat16().float())
    torch.testing.assert_close(y[:, 1:], loop(codec, x[:, 1:], starts=False), rtol=0, atol=1e-4)
    quantised = loop(codec_of(bits, first_position="quantised"), x)
    others = torch.arange(64) != 7
    assert relative_error(x[:, 0, others], quantised[:, 0, others]) > 10 * relative_error(
        x[:, 0, others], y[:, 0, others]
    )


def test_what_holds_no_start_has_no_first_position() -> None:
    codec, token = codec_of(8), drawn(3, 1, 64)
    assert len(codec.encode(token, starts=False)) == 24 + 3 * (64 + 2)  # a later token of a generation
    assert len(codec.encode(token)) == 24 + 3 * 2 * 64
    assert len(codec.encode(token[0, 0])) == 16 + 64 + 2  # a vector has no positions
    assert loop(codec, token).shape == token.shape


# ---- stochastic rounding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_stochastic_rounding_is_unbiased_and_nearest_is_not(bits: Bits) -> None:
    x, n = drawn(2, 256), 500  # wide and light-tailed, so that clipping would pay
    nearest = codec_of(bits, rotate=False, first_position="quantised")
    codec = WireCodec(bits, WireOptions(rotate=False, stochastic=True), generator=torch.Generator().manual_seed(3))
    draws = loop(codec, x.expand(n, 2, 256), starts=False).double()
    scale = x.abs().amax(-1, keepdim=True).double() / {8: 127, 4: 7}[bits] * (1 + 2.0**-7)
    assert bool(((draws - x).abs() < scale * (1 + 1e-5)).all())
    # A draw's standard deviation is at most half a scale. Floor adds its own rounding, 2^-17 of a scale at most.
    bias = ((draws.mean(0) - x).abs() / scale).max()
    assert float(bias) < 5 * 0.5 / math.sqrt(n) + 2.0**-17
    assert float(((loop(nearest, x) - x).abs() / scale).max()) > 0.2


def test_stochastic_rounding_draws_from_its_generator() -> None:
    def payload(generator: torch.Generator | None) -> Tensor:
        return WireCodec.for_gradients(WireOptions(gradient_bits=8, stochastic=True), generator=generator).encode(x)

    x = drawn(2, 4, 64)
    seeded = [payload(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(payload(None), payload(None))


# ---- error feedback ----------------------------------------------------------------------------------------------------


def stream(steps: int, d: int = 64) -> list[Tensor]:
    """Gradients of other shapes at each step: large noise that has no mean, and a small one that all rows share."""
    shared = drawn(d, seed=99) * 2e-11
    lengths = random.Random(4)
    return [drawn(2, lengths.randrange(3, 12), d, seed=step).pow(3) * 1e-9 + shared for step in range(steps)]


@pytest.mark.parametrize(("bits", "rotated"), [(8, False), (4, False), (4, True)])
def test_error_feedback_bounds_the_error_of_the_sum(bits: Bits, rotated: bool) -> None:
    codec = WireCodec(bits, WireOptions(rotate=rotated))
    feedback = ErrorFeedback(codec)
    given_sum = with_feedback = without = torch.zeros(64, dtype=torch.float64)
    for gradient in stream(60):
        given_sum = given_sum + gradient.double().sum((0, 1))
        without = without + loop(codec, gradient).double().sum((0, 1))
        with_feedback = with_feedback + codec.decode(feedback.encode(gradient)).double().sum((0, 1))
    assert feedback.residual is not None
    owed = feedback.residual.double()
    torch.testing.assert_close(given_sum - with_feedback, owed, rtol=0, atol=1e3 * EPS * float(given_sum.abs().max()))
    last = stream(60)[-1]
    rows, largest = last.shape[0] * last.shape[1], {8: 127, 4: 7}[bits]
    peak = (last + feedback.residual).norm(dim=-1).max() if rotated else 1.1 * last.abs().max()
    assert 0 < float(owed.norm()) <= rows * float(peak) / largest * math.sqrt(64) / 2
    assert float(owed.norm()) < 0.4 * float((given_sum - without).norm())


def test_what_is_always_rounded_away_arrives_with_feedback_alone() -> None:
    gradient = torch.full((1, 8, 16), 0.01)
    gradient[..., 0] = 10.0  # the others are far below half a scale
    codec = codec_of(8, rotate=False, first_position="quantised")
    feedback = ErrorFeedback(codec)
    sent = sum(codec.decode(feedback.encode(gradient)) for _ in range(100))
    assert not loop(codec, gradient)[..., 1:].any()
    assert isinstance(sent, Tensor)
    torch.testing.assert_close(sent.sum((0, 1))[1:], torch.full((15,), 8.0), rtol=0.1, atol=0)


def test_feedback_costs_a_single_tensor_little_and_leaves_padding_alone() -> None:
    codec = codec_of(4)
    feedback = ErrorFeedback(codec)
    for seed in range(5):
        gradient = drawn(4, 32, 64, seed=seed)
        gradient[1, 20:] = 0
        received = codec.decode(feedback.encode(gradient))
        assert not received[1, 20:].any()
        assert relative_error(gradient, received) < 1.1 * relative_error(gradient, loop(codec, gradient))


def test_a_tensor_of_zeros_pays_nothing_back_and_a_refused_one_changes_nothing() -> None:
    feedback = ErrorFeedback(codec_of(8))
    feedback.encode(drawn(2, 4, 64))
    assert feedback.residual is not None
    before = feedback.residual.clone()
    assert not feedback.codec.decode(feedback.encode(torch.zeros(2, 4, 64))).any()
    with pytest.raises(TrainingError):
        feedback.encode(torch.full((2, 4, 64), math.nan))
    with pytest.raises(ValueError, match="width 32 after a residual of width 64"):
        feedback.encode(drawn(2, 4, 32))
    assert torch.equal(before, feedback.residual)


def test_feedback_at_full_precision_is_the_codec_itself() -> None:
    feedback, x = ErrorFeedback(codec_of(32)), drawn(2, 4, 64, dtype=torch.float64)
    assert torch.equal(feedback.codec.decode(feedback.encode(x)), x)
    assert feedback.residual is None


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0, 3), (1, 2, 5)], ids=["first", "later"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("half", HALVES)
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, where: tuple[int, ...], bits: Bits, half: Literal["float16", "bfloat16"]
) -> None:
    for dtype, rotated in product((torch.float32, torch.float16), (True, False)):
        x = drawn(2, 3, 16, dtype=dtype)
        x[where] = value
        for what, codec in (
            ("activations", WireCodec.for_activations(WireOptions(activation_bits=bits, half=half, rotate=rotated))),
            ("gradients", WireCodec.for_gradients(WireOptions(gradient_bits=bits, half=half, rotate=rotated))),
        ):
            with pytest.raises(TrainingError, match=f"the {what} hold values that are not finite") as caught:
                codec.encode(x)
            assert caught.value.hint


def test_what_float32_cannot_rotate_is_refused_rather_than_sent_as_infinity() -> None:
    for x in (torch.full((2, 3, 16), 3e38), torch.full((2, 3, 16), 1e300, dtype=torch.float64)):
        with pytest.raises(TrainingError, match="not finite"):
            codec_of(8).encode(x)
        assert torch.equal(loop(codec_of(32), x), x)


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ConfigError, match="group = 10 does not divide the 16 channels") as caught:
        codec_of(8, group=10).encode(drawn(2, 16))
    assert caught.value.hint
    assert loop(codec_of(16, group=10), drawn(2, 16)).shape == (2, 16)  # a group means nothing without integers
    for x in (torch.zeros(2, 0), torch.zeros(0, 2), torch.zeros(1, 1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="no place on the wire"):
            codec_of(8).encode(x)


def test_options_are_checked() -> None:
    for wrong in ({"activation_bits": 5}, {"group": 4}, {"half": "float8"}, {"first_position": "float16"}, {"bits": 8}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WireOptions.model_validate(wrong)
    assert WireCodec.for_activations(WireOptions(activation_bits=8, gradient_bits=4)).bits == 8
    assert WireCodec.for_gradients(WireOptions(activation_bits=8, gradient_bits=4)).bits == 4


def frame(codec: WireCodec) -> bytearray:
    return bytearray(codec.encode(drawn(2, 3, 16)).tolist())


def decoded(codec: WireCodec, data: bytes | bytearray) -> Tensor:
    return codec.decode(torch.tensor(list(data), dtype=torch.uint8))


HUGE = 0xFFFFFFFF
BODY = 24 + 2 * 2 * 16  # where the scales begin in the frame below


@pytest.mark.parametrize(
    ("offset", "new", "message"),
    [
        (0, b"QV", "magic b'QV'"),
        (2, b"\x02", "version 2"),
        (3, b"\x20", "'bits': 32"),
        (3, b"\x05", "'bits': 5"),
        (4, b"\x02", "'flags': 2"),
        (4, b"\x0b", "'flags': 11"),
        (4, b"\x01", "takes"),
        (5, b"\x43", "dtype code 4"),
        (5, b"\x00", "0 dimensions"),
        (5, b"\x06", "6 dimensions"),
        (5, b"\x04", "were agreed"),
        (6, b"\x01\x00", "exponent 1"),
        (8, struct.pack("<I", 8), "'group': 8"),
        (8, struct.pack("<I", 0), "'group': 0"),
        (12, struct.pack("<I", 0), "shape \\(0, 3, 16\\)"),
        (12, struct.pack("<I", 4), "takes .* bytes, got"),
        (12, struct.pack("<2I", HUGE, HUGE), "takes .* bytes, got"),
        (20, struct.pack("<I", HUGE), "groups of 16"),
        (BODY, b"\x80\x7f", "scale"),  # infinity
        (BODY, b"\xc0\x7f", "scale"),  # NaN
        (BODY, b"\x80\xbf", "scale"),  # -1
        (BODY, b"\x7f\x7f", "not finite"),  # the largest scale: finite, but what it scales is not
        (24, b"\x80\x7f", "not finite"),  # an infinity among the halves
        (-1, b"\x80", "below -127"),
    ],
)
def test_malformed_frames_are_refused_by_name(offset: int, new: bytes, message: str) -> None:
    codec = codec_of(8)
    data = frame(codec)
    offset %= len(data)
    data[offset : offset + len(new)] = new
    with pytest.raises(ProtocolError, match=f"malformed activations: .*{message}") as caught:
        decoded(codec, data)
    assert caught.value.hint


def test_values_that_are_not_finite_and_bad_padding_are_refused_on_arrival() -> None:
    raw = frame(codec_of(32))
    raw[24:28] = struct.pack("<f", math.nan)
    with pytest.raises(ProtocolError, match="not finite"):
        decoded(codec_of(32), raw)
    codec = codec_of(4, rotate=False)
    odd = bytearray(codec.encode(drawn(1, 3), starts=False).tolist())
    assert decoded(codec, odd).shape == (1, 3)
    for padded in (0x90, 0x00):
        odd[-1] = odd[-1] & 15 | padded
        with pytest.raises(ProtocolError, match="below -7, or padding"):
            decoded(codec, odd)
    half = codec_of(16, half="float16")
    data = frame(half)
    data[6:8] = struct.pack("<h", 127)
    with pytest.raises(ProtocolError, match="exponent 127"):
        decoded(half, data)


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 0, 16), (HUGE, HUGE, 0), (0, HUGE, HUGE)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_an_empty_tensor_is_refused_whatever_it_claims(bits: Bits, shape: tuple[int, ...]) -> None:
    codec = codec_of(bits)
    flags, group = (3, shape[-1]) if bits < 16 else (0, 0)
    with pytest.raises(ProtocolError, match="in groups of"):
        decoded(codec, struct.pack("<2sBBBBhI3I", b"VQ", 1, bits, flags, 3, 0, group, *shape))


def test_what_is_no_vector_of_bytes_is_refused() -> None:
    for payload in (torch.zeros(40), torch.zeros(4, 10, dtype=torch.uint8), torch.tensor(1, dtype=torch.uint8)):
        with pytest.raises(ProtocolError, match="not a vector of bytes"):
            codec_of(8).decode(payload)


@pytest.mark.parametrize(
    "peer", [{"rotate": False}, {"group": 8}, {"first_position": "quantised"}, {"half": "float16"}], ids=str
)
def test_a_peer_with_other_options_is_refused(peer: dict[str, Any]) -> None:
    mine, theirs = codec_of(8), codec_of(8, **peer)
    for sender, receiver in ((mine, theirs), (theirs, mine)):
        x = drawn(2, 3, 16)
        payload = sender.encode(x)
        if peer == {"first_position": "quantised"} and sender is theirs:
            continue  # the same frame as that of later tokens, which both accept
        with pytest.raises(ProtocolError, match="were agreed"):
            receiver.decode(payload)
    with pytest.raises(ProtocolError, match="'bits': 4"):
        mine.decode(codec_of(4).encode(drawn(2, 3, 16)))


def test_a_payload_may_lie_anywhere_and_is_not_shared() -> None:
    for bits, dtype in product(BITS, DTYPES[:2]):
        x, codec = drawn(2, 3, 17, dtype=dtype).requires_grad_(), codec_of(bits)
        payload = codec.encode(x)
        assert payload.dtype == torch.uint8
        assert not payload.requires_grad
        inside = torch.cat([torch.zeros(3, dtype=torch.uint8), payload])[3:]
        y = codec.decode(inside, device="cpu")
        assert torch.equal(y, codec.decode(payload))
        before = y.clone()
        inside.zero_()
        assert torch.equal(y, before)
        strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(codec.encode(strided), payload)


# ---- fuzzing -----------------------------------------------------------------------------------------------------------

CODECS = [
    WireCodec(bits, WireOptions(half=half, rotate=rotated, group=group))
    for bits, half, rotated, group in product(BITS, HALVES, (True, False), (None, 8))
]
codecs = st.sampled_from(CODECS)


def tensor_or_refusal(codec: WireCodec, data: bytes) -> bool:
    """Whether the bytes were refused, as a protocol error; otherwise they gave a finite tensor of a size they account for."""
    try:
        y = decoded(codec, data)
    except ProtocolError:
        return True
    assert bool(y.isfinite().all())
    assert y.nbytes <= 16 * len(data)  # at most 8 bytes for the half of one
    return False


@given(codec=codecs, data=st.binary(max_size=80), framed=st.booleans())
def test_random_bytes_are_refused(codec: WireCodec, data: bytes, framed: bool) -> None:
    assume(not framed or len(data) > 4)
    tensor_or_refusal(codec, bytes(frame(codec)[: len(data) // 2]) + data if framed else data)
    assert framed or tensor_or_refusal(codec, data)


@given(codec=codecs, data=st.data())
def test_a_truncated_or_extended_frame_is_refused(codec: WireCodec, data: st.DataObject) -> None:
    whole = bytes(frame(codec))
    assert not tensor_or_refusal(codec, whole)
    assert tensor_or_refusal(codec, whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert tensor_or_refusal(codec, whole + data.draw(st.binary(min_size=1, max_size=9)))


@given(codec=codecs, changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_frame_gives_a_tensor_or_a_refusal(codec: WireCodec, changes: list[tuple[int, int]]) -> None:
    data = frame(codec)
    for offset, value in changes:
        data[offset % len(data)] = value
    tensor_or_refusal(codec, bytes(data))


@given(
    codec=codecs,
    kind=st.integers(0, 79),
    flags=st.integers(0, 7),
    exponent=st.integers(-(1 << 15), (1 << 15) - 1),
    dims=st.lists(st.one_of(st.integers(0, 20), st.just(HUGE), st.integers(0, HUGE)), min_size=5, max_size=5),
    group=st.one_of(st.integers(0, 16), st.just(HUGE)),
    body=st.binary(max_size=64),
)
def test_any_header_gives_a_tensor_or_a_refusal(
    codec: WireCodec, kind: int, flags: int, exponent: int, dims: list[int], group: int, body: bytes
) -> None:
    fixed = struct.pack("<2sBBBBhI", b"VQ", 1, codec.bits, flags, kind, exponent, group)
    tensor_or_refusal(codec, fixed + struct.pack("<5I", *dims)[: 4 * (kind & 15)] + body)
