"""Foreign code is run, and leaves nothing behind: not in the model, nor in the process.

Two things are known of lm-evaluation-harness 0.4.13. Its ``HFLM`` calls ``tie_weights()`` on the model it is given.
transformers then makes the output matrix the input embedding once more wherever the *configuration* says that they
are tied, whether or not they still are: a head that was edited apart from its embedding is replaced, without a word,
and what is measured is another model. (It does so even where ``from_pretrained`` had found both matrices in the file,
different, and had left them so.) And it seeds Python's, NumPy's and PyTorch's global generators.
"""

import contextlib
import hashlib
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CrispEditError


@contextlib.contextmanager
def untouched_model(model: Any) -> Iterator[Any]:
    """Within, a model can be used and not re-tied; afterwards it is what it was, or an error says what is not.

    Args:
        model: A model.

    Yields:
        The model, in evaluation mode.

    Raises:
        CrispEditError: A weight was changed.
    """
    before, modes = _bits(model), [(module, module.training) for module in model.modules()]
    model.eval()
    model.tie_weights = lambda *_, **__: None  # hides the class's own
    try:
        yield model
    finally:
        del model.tie_weights
        for module, training in modes:
            module.training = training
    after = _bits(model)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise CrispEditError(f"weights changed while the model was only to be measured: {', '.join(changed)}")


def _bits(model: Any) -> dict[str, str]:
    """A hash of every bit of every parameter and buffer that is in memory, tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    known: dict[int, str] = {}
    for _, tensor in named:
        if id(tensor) not in known:
            known[id(tensor)] = _hash(tensor)
    return {name: known[id(tensor)] for name, tensor in named}


def _hash(tensor: Tensor) -> str:
    """Of shape, type and bits."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if not tensor.is_meta:
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def untouched_process(logger: str) -> Iterator[None]:
    """Within, foreign code may import, seed, log and print; random state, environment and logging are then as before.

    What it prints goes to stderr, of what it logs only errors are shown, and warnings are not.

    Args:
        logger: The name of its own logger.
    """
    environment, python, numpy = dict(os.environ), random.getstate(), np.random.get_state()
    loggers = [logging.getLogger(), logging.getLogger(logger)]
    logs = [(one, one.level, list(one.handlers), one.propagate) for one in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loggers[1].setLevel(logging.ERROR)
            with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
                yield
    finally:
        for one, level, handlers, propagate in logs:
            one.setLevel(level)
            one.handlers[:], one.propagate = handlers, propagate
        random.setstate(python)
        np.random.set_state(numpy)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
