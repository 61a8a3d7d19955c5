"""The two parties of designs that cut the model between them: the provider's trunk server, and an owner with layers of its own."""

from veiltune.parties.split.owner import own_layers
from veiltune.parties.split.plan import CacheOptions, ServerOptions, SplitPlan, WarmUpOptions
from veiltune.parties.split.provider import provide_trunk

__all__ = ["CacheOptions", "ServerOptions", "SplitPlan", "WarmUpOptions", "own_layers", "provide_trunk"]
