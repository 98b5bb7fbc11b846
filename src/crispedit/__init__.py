"""Change what a language model says about chosen things, and leave everything else as it was."""

from ._version import __version__

__all__ = ["__version__"]
