"""Designs that cut the model have two parties: the provider with its trunk, and an owner with layers of its own."""

from veiltune.parties.split.owner import join_with_layers
from veiltune.parties.split.plan import CacheOptions, LastPositions, ServerOptions, SplitPlan, WarmUpOptions
from veiltune.parties.split.provider import Planner, open_trunk, provide_trunk

__all__ = [
    "CacheOptions",
    "LastPositions",
    "Planner",
    "ServerOptions",
    "SplitPlan",
    "WarmUpOptions",
    "join_with_layers",
    "open_trunk",
    "provide_trunk",
]
