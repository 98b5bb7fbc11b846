"""What can go wrong, and the exit status it has on the command line.

    CrispEditError
    ├── InputError               status 2: wrong input or environment; nothing was written
    │   ├── ConfigError          a setting
    │   ├── EditsError           the file of edits
    │   ├── TextsError           the capability texts
    │   ├── ModelError           the model or its tokenizer
    │   ├── EndpointError        a server that judges answers or answers prompts
    │   └── ArtifactError        a directory that crispedit wrote, or is asked to write
    ├── EditFailed               status 1: nothing changed, the loss did not fall, the model cannot be saved
    │   └── NumericsError        a number that is not finite
    ├── LostRank                 status 1: one of several processes of a run is gone, or stuck
    └── Interrupted              status 130: by Ctrl-C, where a part of the result was kept

Every message is one line: what is wrong, and what would be right.
"""

import difflib
from collections.abc import Iterable


class CrispEditError(Exception):
    """Base of every error that crispedit raises on purpose."""

    exit_status = 1


class InputError(CrispEditError):
    """Wrong input or environment: the user can mend it."""

    exit_status = 2


class ConfigError(InputError):
    """A setting has a value that cannot be used."""


class EditsError(InputError):
    """The file of edits cannot be used."""


class TextsError(InputError):
    """The capability texts cannot be used."""


class ModelError(InputError):
    """The model or its tokenizer cannot be loaded or edited."""


class EndpointError(InputError):
    """A server cannot be used: not reached, it refuses the key or the request, or it failed for good."""


class ArtifactError(InputError):
    """A directory that crispedit wrote, or is asked to write, cannot be used."""


class EditFailed(CrispEditError):
    """The edit ran and did not do what it is for; no model was saved."""


class NumericsError(EditFailed):
    """A factor, a loss or a weight is not finite."""


class LostRank(CrispEditError):
    """One of the processes that work together is gone, or does not come."""


class Interrupted(CrispEditError):
    """Ctrl-C, and a part of the result was kept."""

    exit_status = 130


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the name nearest to ``name``, or nothing when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def check_choice(what: str, value: str, known: Iterable[str]) -> None:
    """Raises :class:`ConfigError` unless a setting has one of the known values; it names them, and the nearest."""
    known = list(known)
    if value not in known:
        raise ConfigError(f"{what} is '{value}'; it must be one of {', '.join(known)}{did_you_mean(value, known)}")
