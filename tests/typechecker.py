"""The run-time type checker that the suite puts on every function of the package (see conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any, Self, TypeVar, get_args

from beartype import BeartypeConf, beartype

F = TypeVar("F", bound=Callable[..., Any])

# An int is accepted for a float, as static checkers do.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: F) -> F:
    """``function`` with arguments and result checked, but for hints that mean nothing to an isinstance test."""
    hints = function.__annotations__
    for name, hint in hints.items():
        if not _checkable(hint):
            hints[name] = Any
    return _beartype(function)


def _checkable(hint: object) -> bool:
    """Not ``Self`` (beartype wants the class), a bare protocol, or a class in stubs alone, such as ``select.poll``."""
    if hint is Self or isinstance(hint, BuiltinFunctionType):
        return False
    if getattr(hint, "_is_protocol", False) and not getattr(hint, "_is_runtime_protocol", False):
        return False
    return all(_checkable(part) for part in (hint if isinstance(hint, list) else get_args(hint)))
