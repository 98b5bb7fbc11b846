"""The editors. The folder is the registry: a file is an editor, and its name is the editor's (``-`` for ``_``)."""

import importlib
import inspect
import pkgutil
import re
from types import ModuleType
from typing import Any

from ..errors import ConfigError, did_you_mean
from .base import EditorConfig


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


def configured(name: str, settings: dict[str, Any]) -> tuple[ModuleType, EditorConfig]:
    """An editor as a user names it, with its settings.

    Args:
        name: ``EDITOR`` or ``EDITOR:PRESET``.
        settings: By name; they go before those of the preset.

    Returns:
        The module and the validated configuration.

    Raises:
        ConfigError: There is no such editor or preset, or a setting is unknown or does not fit.
    """
    editor, _, preset = name.partition(":")
    module = find_editor(editor)
    return module, module.Config.of(settings, preset or None)


def describe_editor(name: str) -> dict[str, Any]:
    """What a user may want to know of an editor, from its own docstrings.

    Args:
        name: One of :func:`editor_names`.

    Returns:
        ``summary``, ``settings`` (name to default and meaning), ``presets`` and ``needs``, JSON-ready.

    Raises:
        ConfigError: There is no such editor.
    """
    module = find_editor(name)
    meanings: dict[str, str] = {}
    for parent in reversed(module.Config.__mro__):
        documented = inspect.getdoc(parent) if issubclass(parent, EditorConfig) and parent.__doc__ else ""
        _, _, arguments = (documented or "").partition("Args:\n")
        for field, meaning in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M):
            meanings[field] = re.sub(r":\w+:|`", "", " ".join(meaning.split()))
    default = module.Config()
    needs = [
        ("a curvature", default.needs_curvature()),
        ("capability texts", default.needs_texts()),
        ("a subject in every edit", default.needs_subject),
        ("other edits to learn from", default.needs_train_edits()),
    ]
    return {
        "summary": inspect.getdoc(module).partition("\n")[0].partition(": ")[2].rstrip("."),  # type: ignore[union-attr]
        "settings": {name: (getattr(default, name), meanings[name]) for name in type(default).model_fields},
        "presets": dict(default.presets),
        "needs": ", ".join(what for what, needed in needs if needed),
    }
