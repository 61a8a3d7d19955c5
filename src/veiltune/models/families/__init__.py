"""The table of model families. Adding one: a module here, and its line below."""

from veiltune.models.families.gpt2 import GPT2
from veiltune.models.families.llama import LLAMA
from veiltune.models.families.opt import OPT

FAMILIES = (GPT2, OPT, LLAMA)

__all__ = ["FAMILIES"]
