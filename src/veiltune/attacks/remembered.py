"""What an attacker learnt from public text it has: in one process the same lessons are not learnt twice.

An inverter depends on public text, the public model, the agreed wire and draws, and on nothing that crossed. So the run that is
attacked, its leaky control and the next run with the same agreement share one, number for number as if each had been trained.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

T = TypeVar("T")

MOST = 8
"""Lessons kept; the one that was not asked for longest goes."""

_kept: OrderedDict[str, tuple[Any, Tensor]] = OrderedDict()


def learnt(
    what: Sequence[object],
    model: nn.Module,
    corpus: Sequence[Sequence[int]],
    rng: torch.Generator,
    make: Callable[[], T],
) -> T:
    """What ``make`` returns, made once for all that it depends on; ``rng`` is left as ``make`` leaves it.

    Args:
        what: name and settings, told apart by their ``repr``.
        model: all of its parameters count.
        corpus: tokenised public text.
        rng: its state counts.
        make: depends on nothing else; what it returns must not be changed.
    """
    key = _digest(what, model, corpus, rng)
    if key not in _kept:
        made = make()
        _kept[key] = (made, rng.get_state())
        while len(_kept) > MOST:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    found, after = _kept[key]
    rng.set_state(after)
    return cast(T, found)


def _digest(what: Sequence[object], model: nn.Module, corpus: Sequence[Sequence[int]], rng: torch.Generator) -> str:
    digest = hashlib.sha256(repr((list(what), [list(text) for text in corpus])).encode())
    digest.update(rng.get_state().numpy().tobytes())
    for name, value in model.named_parameters():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
