"""The table of designs. Adding one: a module here, and its line below."""

from pydantic import BaseModel

from veiltune.designs.base import Design
from veiltune.designs.gradfree import GRADFREE
from veiltune.designs.local import LOCAL
from veiltune.designs.obfuscatune import OBFUSCATUNE
from veiltune.designs.offline import OFFLINE
from veiltune.designs.offsite import OFFSITE
from veiltune.designs.online import ONLINE
from veiltune.designs.split import SPLIT
from veiltune.designs.veil import VEIL

DESIGNS: dict[str, Design] = {
    design.name: design for design in (LOCAL, OBFUSCATUNE, VEIL, SPLIT, ONLINE, GRADFREE, OFFSITE, OFFLINE)
}

__all__ = ["DESIGNS", "Design", "option_tables"]


def option_tables() -> dict[str, type[BaseModel]]:
    """By design the model of its own table, as `load_config` takes them."""
    return {name: design.options for name, design in DESIGNS.items()}
