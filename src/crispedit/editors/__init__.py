"""The editors. The folder is the registry: a file is an editor, and its name is the editor's (``-`` for ``_``)."""

import importlib
import pkgutil
from types import ModuleType

from ..errors import ConfigError, did_you_mean


def editor_names() -> tuple[str, ...]:
    """The names of all editors, in alphabetical order."""
    names = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(sorted(name.replace("_", "-") for name in names if name != "base"))


def find_editor(name: str) -> ModuleType:
    """The module of an editor, with its ``Config`` and its ``edit``.

    Args:
        name: One of :func:`editor_names`.

    Returns:
        The module.

    Raises:
        ConfigError: There is no such editor.
    """
    if name not in editor_names():
        known = ", ".join(editor_names())
        raise ConfigError(f"there is no editor '{name}'{did_you_mean(name, editor_names())}; there are: {known}")
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
