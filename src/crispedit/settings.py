"""``--set NAME=VALUE``: an editor's settings as they are written on a command line."""

import json
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Settings by name; values are JSON where they can be read so, else text.

    Args:
        given: ``NAME=VALUE`` each.

    Returns:
        The settings.

    Raises:
        ConfigError: One is not of that form.
    """
    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set is '{item}'; it must be NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
