"""The quantised wire: a float tensor as one vector of bytes that carries its own header, at 32, 16, 8 or 4 bits a number.

*Reference.* GuardedTuning (arXiv 2501.04323) quantises what crosses its cuts and leaves the scheme open. Here: symmetric
integers with one scale a token or group of channels, after a public rotation (QuaRot, arXiv 2404.00456; `privacy.rotation`); the
first position apart, for its state is an outlier in most language models (Sun et al., arXiv 2402.17762); error feedback after
Seide et al. (Interspeech 2014) and Karimireddy et al. (arXiv 1901.09847), on sums over tokens.

*Symbols.* x a row of d numbers, y = x·R (y = x where nothing is rotated), s the scale of a group, q = round(y / s) in [-Q, Q]
with Q = 127 or 7, and ŷ = s·q. s = max|y| / Q rounded up to bfloat16, whose exponents reach as far as float32's. 4 bits instead
take the best of a few smaller s in squared error, clipping what lies beyond, unless the rounding is stochastic: clipping is
biased.

*Reveals.* Everything but the rounding: a quantised wire is no encryption, and the rotation is public.

*Bound.* Without clipping |y - ŷ| <= s/2 (stochastic: < s) in each coordinate, so ‖x - x̂‖ <= s·√d / 2 a row, but for the few
float32 roundings of the rotation; with it, no more squared error than without. Groups all below 1e-35 become zero.

*Format*, little-endian: magic ``VQ``, version u8, bits u8, flags u8 (1 rotated, 2 first position apart, 4 halves are float16),
dtype * 16 + ndim u8, exponent i16, group u32, the dimensions u32 each; then the halves (float16 ones divided by 2^exponent), the
scales in bfloat16, and the numbers: raw for 32 bits, int8, or two nibbles offset by 8 a byte, low first.
"""

from __future__ import annotations

import math
import struct
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from veiltune.config import Section
from veiltune.errors import ConfigError, ProtocolError, TrainingError
from veiltune.privacy.rotation import rotate, unrotate

Bits: TypeAlias = Literal[32, 16, 8, 4]

MAX_DIMENSIONS: Final = 5
_FIXED: Final = struct.Struct("<2sBBBBhI")
_MAGIC, _VERSION = b"VQ", 1
_ROTATED, _APART, _FLOAT16 = 1, 2, 4
_DTYPES: Final = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALVES: Final = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_LARGEST: Final = {8: 127, 4: 7}
_CLIPS: Final = (0.9, 0.8, 0.7, 0.6, 0.5)
_SMALLEST_SCALE: Final = 2.0**-123  # its inverse, and a number divided by it, are normal in float32
_MAX_EXPONENT: Final = 126
_HINT: Final = "the peers' software or [wire] options differ, or the bytes were damaged"


class WireOptions(Section):
    """What crosses the cuts, and in how many bits. Both ends must have the same."""

    activation_bits: Bits = Field(default=32, description="bits a number of activations; 32: as computed, exactly")
    gradient_bits: Bits = Field(default=32, description="bits a number of gradients; 32: as computed, exactly")
    half: Literal["bfloat16", "float16"] = Field(
        default="bfloat16", description="what 16 bits are; float16 has more digits and is scaled as a whole"
    )
    group: int | None = Field(
        default=None, ge=8, lt=1 << 32, description="channels that share a scale, dividing the width; unset: a token's"
    )
    rotate: bool = Field(default=True, description="rotate channels (publicly) before rounding to 8 or 4 bits")
    stochastic: bool = Field(default=False, description="round to 8 or 4 bits at random, without bias, for more noise")
    error_feedback: bool = Field(default=False, description="add what rounding lost of gradients to the next ones")
    first_position: Literal["half", "quantised"] = Field(
        default="half", description="half: each sequence's first position crosses in 16 bits beside 8 or 4"
    )


class _Header(NamedTuple):
    bits: int
    flags: int
    dtype: torch.dtype
    group: int
    shape: tuple[int, ...]
    exponent: int = 0

    def pack(self) -> bytes:
        kind = _DTYPES.index(self.dtype) << 4 | len(self.shape)
        fixed = _FIXED.pack(_MAGIC, _VERSION, self.bits, self.flags, kind, self.exponent, self.group)
        return fixed + struct.pack(f"<{len(self.shape)}I", *self.shape)

    @property
    def num_bytes(self) -> int:
        return _FIXED.size + 4 * len(self.shape)

    @property
    def apart(self) -> bool:
        return bool(self.flags & _APART)

    @property
    def body_bytes(self) -> tuple[int, int, int]:
        """Bytes of the halves, the scales and the numbers."""
        numel = math.prod(self.shape)
        if self.bits == 32:
            return 0, 0, numel * self.dtype.itemsize
        if self.bits == 16:
            return 2 * numel, 0, 0
        halves = numel // self.shape[-2] if self.apart else 0
        rest = numel - halves
        return 2 * halves, 2 * (rest // self.group), -(-rest * self.bits // 8)


class WireCodec:
    """Tensors of shape (..., d) to bytes and back.

    Args:
        bits: a number's width.
        options: the rest of the scheme.
        what: how messages call the tensors.
        generator: of the stochastic rounding, on the device of the tensors; torch's own if None.
    """

    def __init__(
        self, bits: Bits, options: WireOptions, *, what: str = "tensors", generator: torch.Generator | None = None
    ) -> None:
        self.bits: Final = bits
        self.options: Final = options
        self.what: Final = what
        self._generator = generator

    @classmethod
    def for_activations(cls, options: WireOptions, *, generator: torch.Generator | None = None) -> WireCodec:
        """The codec of activations, in either direction."""
        return cls(options.activation_bits, options, what="activations", generator=generator)

    @classmethod
    def for_gradients(cls, options: WireOptions, *, generator: torch.Generator | None = None) -> WireCodec:
        """The codec of gradients, in either direction."""
        return cls(options.gradient_bits, options, what="gradients", generator=generator)

    def encode(self, x: Float[Tensor, "*batch d"], *, starts: bool = True) -> UInt8[Tensor, " n"]:
        """The bytes of ``x``, on its device.

        Args:
            x: rows of d numbers; the dimension before the last counts positions.
            starts: whether position 0 of ``x`` is that of its sequences (false for the later tokens of a generation).

        Raises:
            TrainingError: ``x`` holds NaN or infinity (or numbers that float32 overflows on rotating).
            ConfigError: the group does not divide d.
            ValueError: ``x`` is empty, or has no dimension or more than five.
        """
        if not 1 <= x.ndim <= MAX_DIMENSIONS or x.numel() == 0 or x.dtype not in _DTYPES:
            raise ValueError(f"{self.what} of shape {tuple(x.shape)} and {x.dtype} have no place on the wire")
        header, x = self._header(tuple(x.shape), x.dtype, starts=starts), x.detach()
        if header.group and x.shape[-1] % header.group:
            hint = "choose a divisor of the hidden size, or leave it out for one scale a token"
            raise ConfigError(f"group = {header.group} does not divide the {x.shape[-1]} channels", hint=hint)
        if header.bits == 32:
            self._check_finite(x)
            return torch.cat([_as_bytes(header.pack(), x.device), _bytes_of(x)])
        header, halves, rest = self._halves(header, x)
        scales, numbers = self._integers(rest, header) if rest.numel() else (rest, rest)
        return torch.cat([_as_bytes(header.pack(), x.device), *(_bytes_of(part) for part in (halves, scales, numbers))])

    def decode(self, payload: Tensor, *, device: torch.device | str | None = None) -> Float[Tensor, "*batch d"]:
        """The tensor, in the shape and dtype it had, in memory of its own.

        Args:
            payload: what `encode` gave at a peer with the same options; not trusted.
            device: where to decode; None: where the payload is.

        Raises:
            ProtocolError: anything else. No memory is taken before the length of the payload has justified it.
        """
        if payload.dtype != torch.uint8 or payload.ndim != 1:
            raise self._refusal(f"a {payload.ndim}-dimensional {payload.dtype} is not a vector of bytes")
        header = self._parse(payload)
        body = payload[header.num_bytes :].to(payload.device if device is None else device)
        halves, scales, numbers = body.split(header.body_bytes)
        if header.bits == 32:
            return self._finite(_view(numbers, header.dtype).view(header.shape))
        kind = _HALVES["float16" if header.flags & _FLOAT16 else "bfloat16"]
        apart = _view(halves, kind).float() * 2.0**header.exponent
        if header.bits == 16:
            return self._cast(apart.view(header.shape), header.dtype)
        rest = self._reals(scales, numbers, header)
        if header.apart:
            *batch, length, d = header.shape
            rest = torch.cat([apart.view(-1, 1, d), rest.view(math.prod(batch), length - 1, d)], dim=1)
        return self._cast(rest.view(header.shape), header.dtype)

    def _header(self, shape: tuple[int, ...], dtype: torch.dtype, *, starts: bool) -> _Header:
        """The header that the agreed options give, but for the exponent."""
        options, flags = self.options, 0
        if self.bits < 16:
            apart = starts and len(shape) > 1 and options.first_position == "half"
            flags = _ROTATED * options.rotate | _APART * apart
        if options.half == "float16" and (self.bits == 16 or flags & _APART):
            flags |= _FLOAT16
        group = 0 if self.bits >= 16 else options.group or shape[-1]
        return _Header(self.bits, flags, dtype, group, shape)

    def _parse(self, payload: Tensor) -> _Header:
        """The header, once all its claims agree with the options and the length."""
        head = bytes(payload[: _FIXED.size + 4 * MAX_DIMENSIONS].tolist())
        if len(head) < _FIXED.size:
            raise self._refusal(f"truncated: {len(head)} bytes, of which a header alone takes {_FIXED.size}")
        magic, version, bits, flags, kind, exponent, group = _FIXED.unpack_from(head)
        if magic != _MAGIC or version != _VERSION:
            raise self._refusal(f"magic {magic!r} version {version}, not {_MAGIC!r} version {_VERSION}")
        code, ndim = kind >> 4, kind & 15
        if code >= len(_DTYPES) or not 1 <= ndim <= MAX_DIMENSIONS or len(head) < _FIXED.size + 4 * ndim:
            raise self._refusal(f"dtype code {code} with {ndim} dimensions")
        shape = struct.unpack_from(f"<{ndim}I", head, _FIXED.size)
        header = _Header(bits, flags, _DTYPES[code], group, shape, exponent)
        if 0 in shape or (group and shape[-1] % group):
            raise self._refusal(f"shape {shape} in groups of {group}")
        agreed = self._header(shape, header.dtype, starts=header.apart)._replace(exponent=exponent)
        if header != agreed:
            said, expected = ({"bits": h.bits, "flags": h.flags, "group": h.group} for h in (header, agreed))
            raise self._refusal(f"{said} where {expected} were agreed")
        if abs(exponent) > (_MAX_EXPONENT if flags & _FLOAT16 else 0):
            raise self._refusal(f"exponent {exponent}")
        length = header.num_bytes + sum(header.body_bytes)
        if len(payload) != length:
            raise self._refusal(f"shape {shape} takes {length} bytes, got {len(payload)}")
        return header

    def _halves(self, header: _Header, x: Tensor) -> tuple[_Header, Tensor, Float[Tensor, "rows d"]]:
        """What crosses in 16 bits, and the rows that are left, in float32."""
        d = x.shape[-1]
        if header.bits == 16:
            apart, rest = x.float(), x.new_empty((0, d), dtype=torch.float32)
        elif header.apart:
            sequences = x.float().reshape(-1, *x.shape[-2:])
            apart, rest = sequences[:, 0], sequences[:, 1:].reshape(-1, d)
        else:
            return header, x.new_empty(0), x.float().reshape(-1, d)
        if header.flags & _FLOAT16:  # a power of two brings the largest magnitude into [2^14, 2^15)
            exponent = math.frexp(float(self._check_finite(apart)))[1] - 15
            header = header._replace(exponent=max(-_MAX_EXPONENT, min(_MAX_EXPONENT, exponent)))
            halves = (apart * 2.0**-header.exponent).half()
        else:
            halves = apart.bfloat16()
            self._check_finite(halves)
        return header, halves, rest

    def _integers(self, rows: Float[Tensor, "rows d"], header: _Header) -> tuple[Tensor, Tensor]:
        """Scales (bfloat16) and packed numbers (uint8 or int8)."""
        largest = _LARGEST[header.bits]
        y = (rotate(rows) if header.flags & _ROTATED else rows).reshape(-1, header.group)
        peak = y.abs().amax(-1, keepdim=True)
        self._check_finite(peak)
        scale = _rounded_up(peak / largest)
        if header.bits == 4 and not self.options.stochastic:
            scale = _least_error(y, scale, largest)
        q = y / scale.where(scale > 0, torch.inf)
        if self.options.stochastic:
            q = q.add_(torch.rand(q.shape, generator=self._generator, device=q.device)).floor_()
        else:
            q = q.round_()
        q = q.clamp_(-largest, largest).to(torch.int8).flatten()
        return scale.bfloat16(), q if header.bits == 8 else _pack(q)

    def _reals(self, scales: Tensor, numbers: Tensor, header: _Header) -> Float[Tensor, "rows d"]:
        """What `_integers` was given, but for the rounding; checked."""
        scale = _view(scales, torch.bfloat16).float().unsqueeze(-1)
        if not bool(((scale >= 0) & (scale < torch.inf)).all()):
            raise self._refusal("a scale that is negative or not finite")
        d = header.shape[-1]
        q, count = numbers.view(torch.int8) if header.bits == 8 else _unpack(numbers), len(scale) * header.group
        if q.numel() and (int(q.min()) < -_LARGEST[header.bits] or bool(q[count:].any())):
            raise self._refusal(f"a number below -{_LARGEST[header.bits]}, or padding that is not zero")
        y = (q[:count].view(-1, header.group) * scale).view(-1, d)
        return unrotate(y) if header.flags & _ROTATED else y

    def _check_finite(self, x: Tensor) -> Tensor:
        """The largest magnitude of ``x``, which must be finite (abs and max carry a NaN along: one cheap pass)."""
        peak = x.abs().amax()
        if not bool(peak.isfinite()):
            hint = "lower the learning rate, or look for an overflow in the model's dtype"
            raise TrainingError(f"the {self.what} hold values that are not finite", hint=hint)
        return peak

    def _finite(self, x: Tensor) -> Tensor:
        if not bool(x.abs().amax().isfinite()):
            raise self._refusal("values that are not finite")
        return x

    def _cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x, limit = self._finite(x), torch.finfo(dtype).max
        if dtype.itemsize == 2:  # rounding may pass the largest number of a half; infinities were refused above
            x = x.clamp(-limit, limit)
        return x.to(dtype)

    def _refusal(self, message: str) -> ProtocolError:
        return ProtocolError(f"malformed {self.what}: {message}", hint=_HINT)


# ---- rounding ----------------------------------------------------------------------------------------------------------


def _rounded_up(scale: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The next bfloat16 at or above each finite scale >= 0, in float32; too small to divide by: zero."""
    up = ((scale.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return up.where(scale >= _SMALLEST_SCALE, 0.0)


def _least_error(
    y: Float[Tensor, "groups group"], full: Float[Tensor, "groups 1"], largest: int
) -> Float[Tensor, "groups 1"]:
    """Of the scale that clips nothing and some smaller ones, the one whose rounding has the least squared error."""
    unit = full.where(full > 0, torch.inf)
    v = y / unit  # errors in units of the full scale, for squares of small gradients would underflow
    q = v.round()
    best, least = full, q.sub(v).square_().sum(-1, keepdim=True)
    for clip in _CLIPS:
        scale = _rounded_up(full * clip)
        ratio = scale / unit
        torch.mul(v, 1 / ratio.where(ratio > 0, torch.inf), out=q).round_().clamp_(-largest, largest)
        error = q.mul_(ratio).sub_(v).square_().sum(-1, keepdim=True)
        better = error < least
        best, least = scale.where(better, best), error.where(better, least)
    return best


def _pack(q: Tensor) -> Tensor:
    """Two numbers of [-7, 7] a byte, offset by 8, the first in the low half; an odd last one beside a zero."""
    nibbles = torch.nn.functional.pad(q, (0, len(q) % 2)).add(8).view(torch.uint8)
    return nibbles[::2] | nibbles[1::2] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten().view(torch.int8) - 8


# ---- bytes -------------------------------------------------------------------------------------------------------------


def _as_bytes(data: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _bytes_of(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def _view(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.clone().view(dtype)  # a view of another width needs an aligned start; the payload's is anywhere
