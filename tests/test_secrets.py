"""Handles do not leak, and what is expanded from a master secret is reproducible, separated by label, and random."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from operator import methodcaller

import pytest
import torch
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veiltune.secrets import SECRET_BYTES, MasterSecret, Secret

SECRET = MasterSecret.for_tests(1)


def words_shown(secret: Secret) -> list[str]:
    return [repr(secret), str(secret), f"{secret}", f"{secret!r:>9}", f"{secret:>99}", "%s" % secret]  # noqa: UP031


def test_no_way_of_printing_shows_the_bytes() -> None:
    secret = MasterSecret.generate()
    for shown in [*words_shown(secret), json.dumps({"key": secret}, default=str), repr([secret])]:
        assert "<Secret " in shown
        assert "redacted>" in shown
        assert secret.reveal().hex() not in shown
        assert repr(secret.reveal())[2:-1] not in shown


@pytest.mark.parametrize(
    "leak",
    [
        *(methodcaller("__reduce_ex__", protocol) for protocol in range(6)),  # what pickling asks for
        copy.copy,
        copy.deepcopy,
        lambda s: copy.deepcopy({"key": [s]}),
        json.dumps,
        bytes,
        vars,
        iter,
    ],
)
def test_copying_pickling_and_converting_are_refused(leak: Callable[[object], object]) -> None:
    with pytest.raises(TypeError) as caught:
        leak(SECRET)
    assert SECRET.reveal().hex() not in str(caught.value)


def test_generated_secrets_differ_and_test_secrets_say_that_they_repeat() -> None:
    assert MasterSecret.generate().reveal() != MasterSecret.generate().reveal()
    assert not MasterSecret.generate().reproducible
    assert MasterSecret.for_tests(1).reveal() == SECRET.reveal() != MasterSecret.for_tests(2).reveal()
    assert SECRET.reproducible
    assert "reproducible" in repr(SECRET)


def test_a_restored_secret_expands_alike() -> None:
    assert MasterSecret(SECRET.reveal()).expand("a", 40) == SECRET.expand("a", 40)


@pytest.mark.parametrize("size", [0, SECRET_BYTES - 1, SECRET_BYTES + 1])
def test_a_secret_of_the_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes long, got {size}"):
        MasterSecret(bytes(size))


def slow_stream(secret: bytes, label: str, num_bytes: int) -> bytes:
    """The stream written out from its definition: HKDF as two HMACs (RFC 5869), then AES over a counter."""

    def mac(key: bytes, message: bytes) -> bytes:
        state = hmac.HMAC(key, hashes.SHA256())
        state.update(message)
        return state.finalize()

    key = mac(mac(bytes(32), secret), f"veiltune/v1/stream/{label}".encode() + b"\x01")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305  (the counter is written out below)
    counters = range(-(-num_bytes // 16))
    return b"".join(block.update(counter.to_bytes(16, "big")) for counter in counters)[:num_bytes]


@settings(max_examples=25, deadline=None)
@given(label=st.text(max_size=20), num_bytes=st.integers(0, 200))
def test_expansion_equals_its_definition(label: str, num_bytes: int) -> None:
    assert SECRET.expand(label, num_bytes) == slow_stream(SECRET.reveal(), label, num_bytes)


def test_expansion_goes_on_over_the_edge_of_a_chunk() -> None:
    edge = 1 << 21
    long = SECRET.expand("a", edge + 33)
    assert len(long) == edge + 33
    assert long[:100] == SECRET.expand("a", 100)
    assert long[edge - 16 :] == slow_stream(SECRET.reveal(), "a", edge + 33)[edge - 16 :]


def test_labels_purposes_salts_and_secrets_separate() -> None:
    other = MasterSecret.for_tests(2)
    derived = [
        SECRET.subkey("a"), SECRET.subkey("b"), SECRET.subkey("a", salt=b"1"), SECRET.subkey("a", salt=b"2"),
        SECRET.expand("a", 32), SECRET.expand("b", 32), other.subkey("a"), other.expand("a", 32), SECRET.reveal(),
    ]  # fmt: skip
    assert len(set(derived)) == len(derived)
    assert SECRET.subkey("a") == SECRET.subkey("a")


def kolmogorov_smirnov(sample: Tensor) -> float:
    """√n times the largest distance to the standard normal's distribution function."""
    ordered = sample.sort().values
    cumulative = 0.5 * (1.0 + torch.erf(ordered / math.sqrt(2.0)))
    ranks = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    distance = torch.maximum(cumulative - ranks[:-1], ranks[1:] - cumulative).max()
    return float(distance) * math.sqrt(len(ordered))


def test_normal_has_the_moments_and_distribution_of_a_standard_normal() -> None:
    n = 300_000  # more than one chunk
    sample = SECRET.normal("moments", (n,))
    assert sample.dtype == torch.float64
    # Standard errors of the first four moments of n standard normals: √(1, 2, 15, 96)/√n; five of them allowed.
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float(sample.pow(power).mean()) - moment) < 5 * math.sqrt(variance / n)
    assert kolmogorov_smirnov(sample) < 1.95  # exceeded by one true sample in a thousand; the seed is fixed
    assert kolmogorov_smirnov(sample + 0.02) > 1.95
    assert kolmogorov_smirnov(sample * 1.02) > 1.95


def test_normal_numbers_of_one_pair_and_of_two_labels_are_independent() -> None:
    n = 200_000
    a, b = SECRET.normal("a", (n,)), SECRET.normal("b", (n,))
    limit = 5 / math.sqrt(n)  # of the mean of products of two independent standard normals
    for left, right in ((a, b), (a[::2], a[1::2]), (a[:-1], a[1:]), (a.square() - 1, b.square() - 1)):
        assert abs(float((left * right).mean())) < limit * float(left.std() * right.std()) * math.sqrt(n / len(left))
    assert float((a * a).mean()) > 0.9


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(0, 7), max_size=3).map(tuple))
def test_normal_takes_any_shape_and_is_a_prefix_of_more(shape: tuple[int, ...]) -> None:
    sample = SECRET.normal("shape", shape)
    assert sample.shape == shape
    torch.testing.assert_close(
        sample.flatten(), SECRET.normal("shape", (400,))[: sample.numel()], rtol=1e-14, atol=1e-14
    )


def test_a_permutation_is_one_and_is_uniform() -> None:
    assert SECRET.permutation("p", 100).sort().values.tolist() == list(range(100))
    assert SECRET.permutation("p", 100).tolist() != SECRET.permutation("q", 100).tolist()
    draws = [tuple(SECRET.permutation(f"p{i}", 3).tolist()) for i in range(1200)]
    counts = [draws.count(order) for order in sorted(set(draws))]
    assert len(counts) == 6
    # χ² with five degrees of freedom exceeds 20.5 once in a thousand; the seed is fixed.
    assert sum((count - 200) ** 2 / 200 for count in counts) < 20.5
