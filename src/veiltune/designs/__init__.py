"""The table of designs. Adding one: a module here, and its line below."""

from veiltune.designs.base import Design
from veiltune.designs.local import LOCAL
from veiltune.designs.obfuscatune import OBFUSCATUNE

DESIGNS: dict[str, Design] = {design.name: design for design in (LOCAL, OBFUSCATUNE)}

__all__ = ["DESIGNS", "Design"]
