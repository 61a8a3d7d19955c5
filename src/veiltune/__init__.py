"""Veiltune: fine-tune and use one language model among parties that do not trust one another."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("veiltune")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
